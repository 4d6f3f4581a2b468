# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of queries and keys in one launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import Launcher, ceil_div, eager, on_device_of, operator, power_of_two


@triton.jit
def _rounded_sum(x, y, dtype: tl.constexpr):
    """The sum of two products, each rounded to `dtype` first, as it is when torch computes them apart."""
    if dtype == tl.float64:
        return x + y
    # Plain addition would let the compiler fuse it with a product and skip that product's rounding.
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)],
        dtype=tl.float32, is_pure=True, pack=1,
    ).to(dtype)  # fmt: skip


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, head_stride, seq_stride, heads, first, cos, cos2, sin, sin2, seq, dim, position, channel, mask,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    compute: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    half = dim // 2
    for i in tl.static_range(HEADS):
        head = first + i
        live = mask & (head < heads)
        source = x_ptr + head.to(tl.int64) * head_stride + position * seq_stride + channel
        x = tl.load(source, mask=live, other=0.0).to(compute)
        x2 = tl.load(source + half, mask=live, other=0.0).to(compute)
        if TRANSPOSED:
            y = _rounded_sum(x * cos, x2 * sin2, dtype)
            y2 = _rounded_sum(x2 * cos2, x * -sin, dtype)
        else:
            y = _rounded_sum(x * cos, x2 * -sin, dtype)
            y2 = _rounded_sum(x2 * cos2, x * sin2, dtype)
        target = y_ptr + (head.to(tl.int64) * seq + position) * dim + channel
        tl.store(target, y, mask=live)
        tl.store(target + half, y2, mask=live)


@triton.jit
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_batch_stride, q_head_stride, q_seq_stride, k_batch_stride, k_head_stride, k_seq_stride,
    angle_batch_stride, angle_seq_stride, q_heads, k_heads, seq, dim,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, BLOCK_SEQ: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    # One program rotates a few heads of one stretch of positions, whose angles it reads once.
    compute: tl.constexpr = tl.float64 if q_out_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(seq, BLOCK_SEQ)
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0)
    block = program % blocks
    group = program // blocks % groups
    batch = (program // blocks // groups).to(tl.int64)

    half = dim // 2
    position = block.to(tl.int64) * BLOCK_SEQ + tl.arange(0, BLOCK_SEQ)[:, None]
    channel = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (position < seq) & (channel < half)
    angle = batch * angle_batch_stride + position * angle_seq_stride + channel
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(compute)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(compute)
    cos2 = tl.load(cos_ptr + angle + half, mask=mask, other=0.0).to(compute)
    sin2 = tl.load(sin_ptr + angle + half, mask=mask, other=0.0).to(compute)

    if group < q_groups:
        _rotate_heads(
            q_ptr + batch * q_batch_stride, q_out_ptr + batch * q_heads * seq * dim, q_head_stride, q_seq_stride,
            q_heads, group * HEADS, cos, cos2, sin, sin2, seq, dim, position, channel, mask, TRANSPOSED, HEADS,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + batch * k_batch_stride, k_out_ptr + batch * k_heads * seq * dim, k_head_stride, k_seq_stride,
            k_heads, (group - q_groups) * HEADS, cos, cos2, sin, sin2, seq, dim, position, channel, mask,
            TRANSPOSED, HEADS,
        )  # fmt: skip


_launcher = Launcher(_kernel)


def _output(x: Tensor, angle: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, angle.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _output(query, cos), _output(key, cos)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    query, key, cos, sin = map(_unit_stride, (query, key, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, q_heads, seq, dim = query.shape
    heads, block_half = 2, power_of_two(dim // 2, 1 << 20)
    block_seq = power_of_two(seq, max(1, 512 // block_half))
    groups = ceil_div(q_heads, heads) + ceil_div(key.shape[1], heads)
    direct = eager(query)
    kernel = _launcher if direct else wrap_triton(_kernel)
    with on_device_of(query, direct):
        kernel[(ceil_div(seq, block_seq) * groups * batch,)](
            query, key, cos, sin, q_out, k_out, *query.stride()[:3], *key.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), q_heads, key.shape[1], seq, dim,
            TRANSPOSED=transposed, HEADS=heads, BLOCK_SEQ=block_seq, BLOCK_HALF=block_half, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    # The rotation is linear: its gradient is its transpose, which is the same kernel.
    return *_operator(dq, dk, *ctx.saved_tensors, not ctx.transposed), None, None, None


_operator = operator("rotary", _rotary, _setup_context, _differentiate)


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates `query` and `key` of shape [batch, heads, seq, dim] by `cos` and `sin` of [batch or 1, seq, dim]."""
    if cos.requires_grad or sin.requires_grad:
        # Learned angles are rare enough to leave to torch, and a missing gradient would pass unnoticed.
        return _reference(query, cos, sin), _reference(key, cos, sin)
    return _operator(query, key, cos, sin, False)
