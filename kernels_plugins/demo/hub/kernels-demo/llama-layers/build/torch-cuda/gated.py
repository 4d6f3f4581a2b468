# SPDX-License-Identifier: Apache-2.0
"""Gated activations: `activation(a) * b` for `x = [a, b]`, each direction in one pass over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import Launcher, as_rows, ceil_div, eager, on_device_of, operator, power_of_two

# Elements per program. The forward GELU computes enough to gain from a second independent row.
TILE = 1024
GELU_TILE = 2048


@triton.jit
def _sigmoid(x):
    if x.dtype == tl.float32:
        # exp(-x) as a power of two whose rounded-off exponent is put back: the plain one loses digits as |x| grows.
        z = tl.minimum(tl.maximum(-x, -200.0), 200.0)
        exponent = z * 1.4426950408889634
        rest = tl.fma(z, 1.4426950408889634, -exponent)
        return 1.0 / (1.0 + tl.exp2(exponent) * (1.0 + rest * 0.6931471805599453))
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activation(x, GELU: tl.constexpr):
    if GELU:
        return x * _normal_cdf(x)
    return x * _sigmoid(x)


@triton.jit
def _derivative(x, GELU: tl.constexpr):
    if GELU:
        return _normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    s = _sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0)
    row = (tile // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tile % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    a_ptr = x_ptr + row * x_stride + column
    a = tl.load(a_ptr, mask=mask, other=0.0).to(dtype)
    b = tl.load(a_ptr + columns, mask=mask, other=0.0).to(dtype)
    activated = _activation(a, GELU).to(x_ptr.dtype.element_ty).to(dtype)
    tl.store(y_ptr + row * columns + column, (activated * b).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, dy_ptr, dx_ptr, x_stride, dy_stride, rows, columns,
    GELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    tile = tl.program_id(0)
    row = (tile // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tile % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    a_ptr = x_ptr + row * x_stride + column
    a = tl.load(a_ptr, mask=mask, other=0.0).to(dtype)
    b = tl.load(a_ptr + columns, mask=mask, other=0.0).to(dtype)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
    activated = _activation(a, GELU).to(x_ptr.dtype.element_ty).to(dtype)
    da_ptr = dx_ptr + row * columns * 2 + column
    tl.store(da_ptr, (dy * b * _derivative(a, GELU)).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(da_ptr + columns, (dy * activated).to(dx_ptr.dtype.element_ty), mask=mask)


_forward_launcher = Launcher(_forward_kernel)
_backward_launcher = Launcher(_backward_kernel)


def _forward(x: Tensor, gelu: bool) -> Tensor:
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = as_rows(x)
    rows, width = x.shape[0], power_of_two(columns, TILE)
    height = (GELU_TILE if gelu else TILE) // width
    grid = (ceil_div(rows, height) * ceil_div(columns, width),)
    direct = eager(x)
    kernel = _forward_launcher if direct else wrap_triton(_forward_kernel)
    with on_device_of(x, direct):
        kernel[grid](x, y, x.stride(0), rows, columns, GELU=gelu, BLOCK_ROWS=height, BLOCK_COLUMNS=width, num_warps=4)
    return y


def _backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx
    dy, x = as_rows(dy), as_rows(x)
    rows, columns = dy.shape
    width = power_of_two(columns, TILE)
    height = TILE // width
    grid = (ceil_div(rows, height) * ceil_div(columns, width),)
    direct = eager(x)
    kernel = _backward_launcher if direct else wrap_triton(_backward_kernel)
    with on_device_of(x, direct):
        kernel[grid](
            x, dy, dx, x.stride(0), dy.stride(0), rows, columns,
            GELU=gelu, BLOCK_ROWS=height, BLOCK_COLUMNS=width, num_warps=4,
        )  # fmt: skip
    return dx


_gradient = operator("gated_backward", _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.gelu = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _gradient(dy, *ctx.saved_tensors, ctx.gelu), None


_operator = operator("gated", _forward, _setup_context, _differentiate)


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns `silu(a) * b` for `x = [a, b]` along the last dimension."""
    return _operator(x, False)


def gelu_and_mul(x: Tensor) -> Tensor:
    """Returns `gelu(a) * b`, with the exact GELU, for `x = [a, b]` along the last dimension."""
    return _operator(x, True)
