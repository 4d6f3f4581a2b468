"""Rotary position embedding of queries and keys in one launch.

A row is turned by `x * cos + rotate_half(x) * sin`, with each product rounded to the dtype of the result, as it is
where PyTorch computes them one after the other. Cosines and sines may differ in both halves.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, cached, operator, power_of_two

_OUTER_HEADS, _INNER_HEADS = 2, 8
"""Heads that a program turns, whose angles it reads once: more where those of a position are side by side."""


_ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""The interpreter has no assembly, and fuses nothing."""


@triton.jit
def _sum(x, y, dtype: tl.constexpr):
    """The sum of two products, each rounded to the dtype first."""
    x, y = x.to(dtype).to(x.dtype), y.to(dtype).to(y.dtype)
    if _ASSEMBLY and x.dtype == tl.float32:
        # A plain sum would be fused with a product, without the rounding of that.
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        ).to(dtype)  # fmt: skip
    return (x + y).to(dtype)


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, head_stride, seq_stride, heads, seq, first, cos, cos2, sin, sin2, half, dim, position, live,
    OUTER_HEADS: tl.constexpr, TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    compute: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_HALF)[None, :]
    for i in tl.static_range(HEADS):
        head = (first + i).to(tl.int64)
        source = x_ptr + head * head_stride + position * seq_stride
        target = y_ptr + (head * seq + position if OUTER_HEADS else position * heads + head) * dim
        mask = live & (head < heads) & (column < half)
        x = tl.load(source + column, mask=mask, other=0.0).to(compute)
        x2 = tl.load(source + half + column, mask=mask, other=0.0).to(compute)
        if TRANSPOSED:
            turned, turned2 = x2 * sin2, x * -sin
        else:
            turned, turned2 = x2 * -sin, x * sin2
        tl.store(target + column, _sum(x * cos, turned, dtype), mask=mask)
        tl.store(target + half + column, _sum(x2 * cos2, turned2, dtype), mask=mask)
        if BLOCK_REST:  # the columns past those that are turned
            rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
            mask = live & (head < heads) & (rest < dim)
            tl.store(target + rest, tl.load(source + rest, mask=mask, other=0.0).to(dtype), mask=mask)


_FREE = ["q_batch_stride", "k_batch_stride", "angle_batch_stride", "seq"]


@triton.jit(do_not_specialize=_FREE)
def _kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, qy_ptr, ky_ptr,
    q_batch_stride, k_batch_stride, angle_batch_stride, seq,
    q_head_stride, q_seq_stride, k_head_stride, k_seq_stride, angle_seq_stride, angle_half, q_heads, k_heads, half, dim,
    Q_OUTER_HEADS: tl.constexpr, K_OUTER_HEADS: tl.constexpr, TRANSPOSED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SEQ: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    compute: tl.constexpr = tl.float64 if qy_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(seq, BLOCK_SEQ)
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    program = tl.program_id(0)
    group = program // blocks % groups
    batch = (program // blocks // groups).to(tl.int64)

    position = (program % blocks).to(tl.int64) * BLOCK_SEQ + tl.arange(0, BLOCK_SEQ)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    live = position < seq
    mask = live & (column < half)
    angle = batch * angle_batch_stride + position * angle_seq_stride + column
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(compute)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(compute)
    cos2 = tl.load(cos_ptr + angle + angle_half, mask=mask, other=0.0).to(compute)
    sin2 = tl.load(sin_ptr + angle + angle_half, mask=mask, other=0.0).to(compute)

    if group < q_groups:
        _turn_heads(
            q_ptr + batch * q_batch_stride, qy_ptr + batch * q_heads * seq * dim, q_head_stride, q_seq_stride, q_heads,
            seq, group * HEADS, cos, cos2, sin, sin2, half, dim, position, live,
            Q_OUTER_HEADS, TRANSPOSED, HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_heads(
            k_ptr + batch * k_batch_stride, ky_ptr + batch * k_heads * seq * dim, k_head_stride, k_seq_stride, k_heads,
            seq, (group - q_groups) * HEADS, cos, cos2, sin, sin2, half, dim, position, live,
            K_OUTER_HEADS, TRANSPOSED, HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


_launch = Launcher(_kernel)


def _output(x: Tensor, angle: Tensor) -> Tensor:
    """Return an uninitialised tensor in the order of another, if positions and heads are outside of its columns."""
    if x.dtype is angle.dtype:
        y = torch.empty_like(x)  # most calls: a keyword would take as long as the rest
    else:
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, angle.dtype))
    if y.is_contiguous() or y.transpose(1, 2).is_contiguous():
        return y
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


Sizes = tuple[int, ...]


@cached
def _plan(
    q: Sizes, q_strides: Sizes, q_dense: bool, k: Sizes, k_strides: Sizes, k_dense: bool,
    cos: Sizes, cos_strides: Sizes, heads: int, halves: int, transposed: bool,
) -> tuple[int, Sizes, Sizes, tuple[Any, ...]]:  # fmt: skip
    """Return the programs, and the numbers and constants of the kernel, for shapes and strides.

    `q_dense` and `k_dense` say whether what becomes of queries and keys is contiguous.
    """
    seq, dim, half = q[3 - heads], q[3], cos[2] // halves
    rest = dim - 2 * half
    block_half = power_of_two(half, 1 << 20)
    block_seq = power_of_two(seq, max(1, 512 // block_half))
    q_outer, k_outer = q_dense == (heads == 1), k_dense == (heads == 1)  # heads are outside of positions
    each = _OUTER_HEADS if q_outer else _INNER_HEADS
    groups = -(-q[heads] // each) - (-k[heads] // each)
    return (
        -(-seq // block_seq) * groups * q[0],
        (q_strides[0], k_strides[0], cos_strides[0] if cos[0] > 1 else 0, seq),
        (
            q_strides[heads], q_strides[3 - heads], k_strides[heads], k_strides[3 - heads], cos_strides[1],
            half if halves == 2 else 0, q[heads], k[heads], half, dim,
        ),
        (q_outer, k_outer, transposed, each, block_seq, block_half, power_of_two(rest, 1 << 20) if rest else 0),
    )  # fmt: skip


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int, halves: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Turn tensors of 4 dimensions, of which `heads` is that of heads; the angles are for `halves` of the columns."""
    qy, ky = _output(q, cos), _output(k, cos)
    if qy.numel() + ky.numel() == 0:
        return qy, ky
    q, k, cos, sin = _unit_stride(q), _unit_stride(k), _unit_stride(cos), _unit_stride(sin)
    angle_strides = cos.stride()
    if angle_strides != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
        angle_strides = cos.stride()
    programs, free, numbers, constants = _plan(
        q.shape, q.stride(), qy.is_contiguous(), k.shape, k.stride(), ky.is_contiguous(), cos.shape, angle_strides,
        heads, halves, transposed,
    )  # fmt: skip
    _launch(programs, 4, (q, k, cos, sin, qy, ky), free, numbers, constants)
    return qy, ky


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.heads, ctx.halves, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    # A rotation is linear: its gradient is its transpose, by the same kernel.
    dq, dk = turn(dq, dk, *ctx.saved_tensors, ctx.heads, ctx.halves, not ctx.transposed)
    return dq, dk, None, None, None, None, None


turn = operator("rotary", _rotate, _save, _differentiate)
"""As `rotary`, for tensors that are known to fit."""


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int = 1, halves: int = 2) -> bool:
    """Whether `rotary` takes these: shapes, and angles without gradients, which it does not compute."""
    of_q, of_k, of_cos = q.shape, k.shape, cos.shape
    if not (len(of_q) == len(of_k) == 4 and len(of_cos) == 3 and of_cos == sin.shape and heads in (1, 2)):
        return False
    batch, seq, dim, width = of_q[0], of_q[3 - heads], of_q[3], of_cos[2]
    return (
        (of_k[0], of_k[3 - heads], of_k[3]) == (batch, seq, dim)
        and (of_cos[0] in (1, batch) and of_cos[1] == seq)
        and (width % 2 == 0 if halves == 2 else True)
        and 0 < width // halves * 2 <= dim
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int = 1, halves: int = 2) -> tuple[Tensor, Tensor]:
    """Turn the first columns of queries and keys, as many as the angles are for.

    Args:
        q: Of shape [batch, heads, positions, columns], or with positions before heads.
        k: The same, of any number of heads.
        cos: Of shape [batch or 1, positions, columns to turn], or half as many.
        sin: The same.
        heads: The dimension of heads, 1 or 2.
        halves: 2 if the angles are for both halves of the columns to turn, which may differ; 1 if both have the same.
    """
    if not fits(q, k, cos, sin, heads, halves):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, cos, sin))
        raise ValueError(f"rotary does not take tensors of shape {shapes}, or angles that require gradients")
    return turn(q, k, cos, sin, heads, halves, False)  # type: ignore[no-any-return]
