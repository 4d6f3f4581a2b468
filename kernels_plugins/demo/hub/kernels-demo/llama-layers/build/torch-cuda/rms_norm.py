# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation: one pass over memory forward, one backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import Launcher, as_rows, ceil_div, eager, on_device_of, operator, power_of_two, resources

# Rows up to these widths stay in registers between the reduction and the result; wider ones are read twice.
FORWARD_WIDTH = 32768
BACKWARD_WIDTH = 16384

# Compiled code hands `eps` over in float64, hence the kernels' `tl.cast`: else they would compute in it.


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(dtype)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + tl.cast(eps, dtype))
    normalised = (x * scale).to(x_ptr.dtype.element_ty).to(dtype)
    tl.store(y_ptr + row * columns + column, (normalised * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_wide_kernel(x_ptr, weight_ptr, y_ptr, x_stride, columns, eps, BLOCK: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * columns
    squares = tl.zeros([BLOCK], dtype)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(dtype)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + tl.cast(eps, dtype))
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        x = tl.load(x_ptr + column, mask=mask, other=0.0).to(dtype)
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(dtype)
        normalised = (x * scale).to(x_ptr.dtype.element_ty).to(dtype)
        tl.store(y_ptr + column, (normalised * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, partial_ptr, x_stride, dy_stride, rows, columns, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A fixed set of programs strides over the rows, so each sums its share of the weight's gradient in registers.
    dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_mask = column < columns
    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(dtype)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & column_mask
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
        grad = dy * weight
        # Both sums come from the raw values, so neither reduction waits for the other.
        squares = tl.sum(x * x, axis=1, keep_dims=True) / columns
        inner = tl.sum(grad * x, axis=1, keep_dims=True) / columns
        # Rows past the end are zeros: without an epsilon, their scale would be infinite, and zero times that NaN.
        scale = tl.rsqrt(tl.where(row < rows, squares + tl.cast(eps, dtype), 1.0))
        normalised = x * scale
        dx = (grad - normalised * (inner * scale)) * scale
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normalised.to(x_ptr.dtype.element_ty).to(dtype)
    partial_ptr += tl.program_id(0).to(tl.int64) * columns
    tl.store(partial_ptr + column, tl.sum(dweight, axis=0, keep_dims=True), mask=column_mask)


@triton.jit
def _backward_wide_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    x_stride,
    dy_stride,
    rows,
    columns,
    eps,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64)
    partial_ptr += first * columns
    for row in range(first, rows, tl.num_programs(0)):
        squares = tl.zeros([BLOCK], dtype)
        inner = tl.zeros([BLOCK], dtype)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < columns
            x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
            weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(dtype)
            squares += x * x
            inner += dy * weight * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + tl.cast(eps, dtype))
        projection = tl.sum(inner, axis=0) / columns * scale
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < columns
            x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
            weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(dtype)
            normalised = x * scale
            dx = (dy * weight - normalised * projection) * scale
            tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            # Too wide for registers: the program's share of the weight's gradient lives in its own row of memory.
            dweight = tl.load(partial_ptr + column, mask=mask & (row > first), other=0.0)
            dweight += dy * normalised.to(x_ptr.dtype.element_ty).to(dtype)
            tl.store(partial_ptr + column, dweight, mask=mask)
        tl.debug_barrier()


@triton.jit
def _sum_kernel(partial_ptr, total_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], partial_ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (column < columns)
        total += tl.load(partial_ptr + row.to(tl.int64) * columns + column, mask=mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(total_ptr + column, total.to(total_ptr.dtype.element_ty), mask=column < columns)


_forward_launcher = Launcher(_forward_kernel)
_forward_wide_launcher = Launcher(_forward_wide_kernel)
_backward_launcher = Launcher(_backward_kernel)
_backward_wide_launcher = Launcher(_backward_wide_kernel)
_sum_launcher = Launcher(_sum_kernel)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = x.dtype if x.dtype == weight.dtype else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    x, weight = as_rows(x), weight.contiguous()
    rows, columns = x.shape
    direct = eager(x)
    with on_device_of(x, direct):
        if columns > FORWARD_WIDTH:
            kernel = _forward_wide_launcher if direct else wrap_triton(_forward_wide_kernel)
            kernel[(rows,)](x, weight, y, x.stride(0), columns, eps, BLOCK=8192, num_warps=32)
        else:
            width = power_of_two(columns, FORWARD_WIDTH)
            height = max(1, 2048 // width)
            kernel = _forward_launcher if direct else wrap_triton(_forward_kernel)
            kernel[(ceil_div(rows, height),)](
                x, weight, y, x.stride(0), rows, columns, eps,
                BLOCK_ROWS=height, BLOCK_COLUMNS=width, num_warps=min(32, max(4, width // 512)),
            )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dy, x, weight = as_rows(dy), as_rows(x), weight.contiguous()
    rows, columns = x.shape
    width = power_of_two(columns, BACKWARD_WIDTH)
    height = max(1, 4096 // width)
    # Copies of the next tiles run ahead through shared memory, of which an SM holds about 96 KiB of them in all.
    multiprocessors, shared = resources(x.device)
    tile = height * width * (x.element_size() + dy.element_size())
    stages = 3 if 3 * tile <= min(shared - 2048, 96 * 1024) else 1
    programs = min(ceil_div(rows, height), multiprocessors * max(1, min(2, 32 * 1024 // tile)))
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    partial = torch.empty((programs, columns), dtype=dtype, device=x.device)
    direct = eager(x)
    with on_device_of(x, direct):
        if columns > BACKWARD_WIDTH:
            kernel = _backward_wide_launcher if direct else wrap_triton(_backward_wide_kernel)
            kernel[(programs,)](
                x, weight, dy, dx, partial, x.stride(0), dy.stride(0), rows, columns, eps, BLOCK=8192, num_warps=32
            )  # fmt: skip
        else:
            kernel = _backward_launcher if direct else wrap_triton(_backward_kernel)
            kernel[(programs,)](
                x, weight, dy, dx, partial, x.stride(0), dy.stride(0), rows, columns, eps,
                BLOCK_ROWS=height, BLOCK_COLUMNS=width, STAGES=stages, num_warps=min(16, max(8, width // 1024)),
            )  # fmt: skip
        # Only now, while the GPU has something to do: all before it waits for the first launch.
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        kernel = _sum_launcher if direct else wrap_triton(_sum_kernel)
        kernel[(ceil_div(columns, 16),)](
            partial, dweight, programs, columns, BLOCK_ROWS=256, BLOCK_COLUMNS=16, num_warps=8
        )
    return dx, dweight


_gradient = operator("rms_norm_backward", _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The scale of each row is not saved: the backward holds the row in registers and finds it again for free.
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradient(dy, *ctx.saved_tensors, ctx.eps), None


_operator = operator("rms_norm", _forward, _setup_context, _differentiate)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension of `x` in float32, rounds to its dtype, then multiplies by `weight`."""
    return _operator(x, weight, eps)
