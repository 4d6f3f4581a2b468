"""Root-mean-square normalisation, also of a sum: one pass over memory forward, one backward.

The sums of squares are of float32, or float64 for that dtype. With an offset of 0, a row is rounded to its dtype before
it is multiplied by the weight, as in Llama; with another, `offset + weight` multiplies it before, as in Gemma.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, as_rows, cached, new_rows, operator, power_of_two, resources

# Rows up to these widths stay in registers between the sums and the results; wider ones are read twice.
FORWARD_WIDTH = 32768
BACKWARD_WIDTH = 16384

_FREE = ["rows", "eps"]
"""Parameters for whose values no machine code of their own is made."""

# Compiled code passes `eps` in float64: without `tl.cast`, kernels would compute in that.


@triton.jit
def _scaled(x, scale, weight, OFFSET: tl.constexpr, dtype: tl.constexpr):
    if OFFSET == 0.0:
        return (x * scale).to(dtype).to(x.dtype) * weight
    return x * scale * (weight + OFFSET)


@triton.jit(do_not_specialize=_FREE)
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, rows, eps, x_stride, columns,
    OFFSET: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(dtype)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + tl.cast(eps, dtype))
    y = _scaled(x, scale, weight, OFFSET, x_ptr.dtype.element_ty)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def _add_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, eps, x_stride, residual_stride, columns,
    OFFSET: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
    x += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(dtype)
    total = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * columns + column, total, mask=mask)
    x = total.to(dtype)  # the norm is that of the rounded sum, which the next layers get
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(dtype)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + tl.cast(eps, dtype))
    y = _scaled(x, scale, weight, OFFSET, sum_ptr.dtype.element_ty)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def _wide_forward_kernel(
    x_ptr, weight_ptr, y_ptr, rows, eps, x_stride, columns, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
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
        y = _scaled(x, scale, weight, OFFSET, x_ptr.dtype.element_ty)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factor(weight, OFFSET: tl.constexpr):
    return weight if OFFSET == 0.0 else weight + OFFSET


@triton.jit
def _rounded(normalised, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Round as the forward did, before the product with the weight."""
    return normalised.to(dtype).to(normalised.dtype) if OFFSET == 0.0 else normalised


@triton.jit
def _gradient_of(x, grad, dsum_ptr, projection, scale, mask, ADD: tl.constexpr):
    dx = (grad - x * scale * projection) * scale
    if ADD:
        dx += tl.load(dsum_ptr, mask=mask, other=0.0).to(dx.dtype)
    return dx


@triton.jit(do_not_specialize=_FREE)
def _backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dsum_ptr, dx_ptr, partial_ptr, rows, eps, x_stride, dy_stride, dsum_stride, columns,
    OFFSET: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, MORE_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A fixed set of programs strides over the rows, and each sums its share of the weight's gradient in registers.
    # Rows are one block of columns, or two, where the power of two that covers them would take too many registers;
    # then, these do not hold the weight, either.
    dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    narrow: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = column < columns
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype)
    if MORE_COLUMNS:
        column2 = BLOCK_COLUMNS + tl.arange(0, MORE_COLUMNS)[None, :]
        inside2 = column2 < columns
        dweight2 = tl.zeros([BLOCK_ROWS, MORE_COLUMNS], dtype)
    else:
        factor = _factor(tl.load(weight_ptr + column, mask=inside, other=0.0).to(dtype), OFFSET)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & inside
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
        if MORE_COLUMNS:
            factor = _factor(tl.load(weight_ptr + column, mask=inside, other=0.0).to(dtype), OFFSET)
        grad = dy * factor
        # Both sums are of the raw values, so that neither waits for the other.
        squares = tl.sum(x * x, axis=1, keep_dims=True)
        inner = tl.sum(grad * x, axis=1, keep_dims=True)
        if MORE_COLUMNS:
            mask2 = (row < rows) & inside2
            x2 = tl.load(x_ptr + row * x_stride + column2, mask=mask2, other=0.0).to(dtype)
            dy2 = tl.load(dy_ptr + row * dy_stride + column2, mask=mask2, other=0.0).to(dtype)
            grad2 = dy2 * _factor(tl.load(weight_ptr + column2, mask=inside2, other=0.0).to(dtype), OFFSET)
            squares += tl.sum(x2 * x2, axis=1, keep_dims=True)
            inner += tl.sum(grad2 * x2, axis=1, keep_dims=True)
        # Rows past the end are zeros: without an epsilon, their scale would be infinite, and zero times that NaN.
        scale = tl.rsqrt(tl.where(row < rows, squares / columns + tl.cast(eps, dtype), 1.0))
        projection = inner / columns * scale
        added = dsum_ptr + row * dsum_stride
        target = dx_ptr + row * columns
        dx = _gradient_of(x, grad, added + column, projection, scale, mask, ADD)
        tl.store(target + column, dx.to(narrow), mask=mask)
        if WEIGHT:
            dweight += dy * _rounded(x * scale, OFFSET, narrow)
        if MORE_COLUMNS:
            dx = _gradient_of(x2, grad2, added + column2, projection, scale, mask2, ADD)
            tl.store(target + column2, dx.to(narrow), mask=mask2)
            if WEIGHT:
                dweight2 += dy2 * _rounded(x2 * scale, OFFSET, narrow)
    if WEIGHT:
        partial_ptr += tl.program_id(0).to(tl.int64) * columns
        tl.store(partial_ptr + column, tl.sum(dweight, axis=0, keep_dims=True), mask=inside)
        if MORE_COLUMNS:
            tl.store(partial_ptr + column2, tl.sum(dweight2, axis=0, keep_dims=True), mask=inside2)


@triton.jit(do_not_specialize=_FREE)
def _wide_backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, partial_ptr, rows, eps, x_stride, dy_stride, columns,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
            factor = _factor(tl.load(weight_ptr + column, mask=mask, other=0.0).to(dtype), OFFSET)
            squares += x * x
            inner += dy * factor * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + tl.cast(eps, dtype))
        projection = tl.sum(inner, axis=0) / columns * scale
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < columns
            x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(dtype)
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
            factor = _factor(tl.load(weight_ptr + column, mask=mask, other=0.0).to(dtype), OFFSET)
            normalised = x * scale
            dx = (dy * factor - normalised * projection) * scale
            tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            # Too wide for registers: the program's share of the weight's gradient is in its own row of memory.
            dweight = tl.load(partial_ptr + column, mask=mask & (row > first), other=0.0)
            dweight += dy * _rounded(normalised, OFFSET, x_ptr.dtype.element_ty)
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


_launch_forward = Launcher(_forward_kernel)
_launch_add_forward = Launcher(_add_forward_kernel)
_launch_wide_forward = Launcher(_wide_forward_kernel)
_launch_backward = Launcher(_backward_kernel)
_launch_wide_backward = Launcher(_wide_backward_kernel)
_launch_sum = Launcher(_sum_kernel)


def _misfit(x: Tensor, weight: Tensor) -> ValueError:
    return ValueError(f"rows of shape {tuple(x.shape)} do not fit a weight of shape {tuple(weight.shape)}")


@cached
def _forward_plan(columns: int, offset: float) -> tuple[int, int, tuple[float, int, int]]:
    """Return the rows of a block, its warps, and the constants of the kernel."""
    width = power_of_two(columns, FORWARD_WIDTH)
    height = max(1, 2048 // width)
    return height, min(32, max(4, width // 512)), (offset, height, width)


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    columns = weight.numel()
    if x.size(-1) != columns:  # a kernel would read past the end
        raise _misfit(x, weight)
    if x.dtype is weight.dtype and x.is_contiguous():  # as nearly always: the shortest way, for small inputs
        y = torch.empty_like(x)
        rows, stride = x.numel() // columns if columns else 0, columns
    else:
        y = new_rows(x, torch.promote_types(x.dtype, weight.dtype))
        x, rows, _, stride = as_rows(x)
    if not rows or not columns:
        return y
    tensors = (x, weight.contiguous(), y)
    if columns > FORWARD_WIDTH:
        _launch_wide_forward(rows, 32, tensors, (rows, eps), (stride, columns), (offset, 8192))
    else:
        height, warps, constants = _forward_plan(columns, offset)
        _launch_forward(-(-rows // height), warps, tensors, (rows, eps), (stride, columns), constants)
    return y


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    if x.size(-1) != weight.numel():
        raise _misfit(x, weight)
    if x.shape != residual.shape or x.dtype is not residual.dtype:
        given = f"{tuple(x.shape)} of {x.dtype} and {tuple(residual.shape)} of {residual.dtype}"
        raise ValueError(f"rows and their residual differ: {given}")
    if x.shape[-1] > FORWARD_WIDTH:
        total = (x + residual).contiguous()
        return _forward(total, weight, eps, offset), total
    total = new_rows(x, x.dtype)
    y = new_rows(total, x.dtype if x.dtype is weight.dtype else torch.promote_types(x.dtype, weight.dtype))
    if not y.numel():
        return y, total
    x, rows, columns, stride = as_rows(x)
    residual, _, _, residual_stride = as_rows(residual)
    height, warps, constants = _forward_plan(columns, offset)
    tensors = (x, residual, weight.contiguous(), y, total)
    numbers = (stride, residual_stride, columns)
    _launch_add_forward(-(-rows // height), warps, tensors, (rows, eps), numbers, constants)
    return y, total


@cached
def _backward_plan(columns: int, size: int, weight_size: int, device: int) -> tuple[int, int, int, int, int, int]:
    """Return rows and columns of a block, columns of a second one, its stages and warps, and the most programs.

    The numbers are the best of those tried on an H100: one program on each multiprocessor, with as many rows on their
    way to it as keep the memory busy.

    Args:
        columns: In a row.
        size: Bytes of a number of the rows and of one of each gradient, together.
        weight_size: Bytes of a number of the weight.
        device: The number of the GPU.
    """
    multiprocessors, shared = resources(device)
    width, more = power_of_two(columns, BACKWARD_WIDTH), 0
    if width > 8192:
        width, more = 8192, power_of_two(columns - 8192, 8192)
    height = max(1, 8192 // width)
    block = height * (width + more) * (size + weight_size if more else size)
    stages = 4 if height * columns * size <= 24 * 1024 else 3
    while stages > 1 and block * (stages - 1) > shared - 24 * 1024:  # all but one are in shared memory
        stages -= 1
    return height, width, more, stages, 16 if more else 8, multiprocessors


def _backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, offset: float, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows and weight; that of the weight is empty if it is not wanted."""
    dx = new_rows(x, x.dtype)
    if not dx.numel():
        return dx, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    x, rows, columns, x_stride = as_rows(x)
    dy, _, _, dy_stride = as_rows(dy)
    weight = weight.contiguous()
    size = x.itemsize + dy.itemsize + (0 if dsum is None else dsum.itemsize)
    height, width, more, stages, warps, programs = _backward_plan(columns, size, weight.itemsize, x.get_device())
    programs = min(programs, -(-rows // height))
    wide = columns > BACKWARD_WIDTH
    partial = dx  # not used, if no gradient of the weight is wanted
    if with_weight or wide:
        dtype = torch.float64 if dy.dtype is torch.float64 else torch.float32
        partial = x.new_empty((programs, columns), dtype=dtype)
    if wide:
        tensors = (x, weight, dy, dx, partial)
        _launch_wide_backward(programs, 32, tensors, (rows, eps), (x_stride, dy_stride, columns), (offset, 8192))
        if dsum is not None:
            dx += dsum
    else:
        added, _, _, dsum_stride = (dy, rows, columns, dy_stride) if dsum is None else as_rows(dsum)
        _launch_backward(
            programs, warps, (x, weight, dy, added, dx, partial), (rows, eps),
            (x_stride, dy_stride, dsum_stride, columns),
            (offset, dsum is not None, with_weight, height, width, more, stages),
        )  # fmt: skip
    if not with_weight:
        return dx, weight.new_empty(0)
    # Only now, while the GPU has something to do: all before it waits for the first launch.
    dweight = torch.empty_like(weight)
    _launch_sum(-(-columns // 16), 8, (partial, dweight), (), (programs, columns), (256, 16))
    return dx, dweight


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return _backward(dy, None, x, weight, eps, offset, with_weight)


def _sum_backward(
    dy: Tensor, dsum: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return _backward(dy, dsum, x, weight, eps, offset, with_weight)


_gradient = operator("rms_norm_backward", _norm_backward)
_sum_gradient = operator("add_rms_norm_backward", _sum_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The scale of each row is not saved: the backward holds the row in registers, and finds it again for nothing.
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    with_weight = ctx.needs_input_grad[1]
    dx, dweight = _gradient(dy, *ctx.saved_tensors, ctx.eps, ctx.offset, with_weight)
    return dx, dweight if with_weight else None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)  # the sum may have no other use


def _differentiate_sum(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dsum, dsum, None, None, None
    total, weight = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[2]
    rest = (total, weight, ctx.eps, ctx.offset, with_weight)
    dx, dweight = _gradient(dy, *rest) if dsum is None else _sum_gradient(dy, dsum, *rest)
    return dx, dx, dweight if with_weight else None, None, None


_operator = operator("rms_norm", _forward, _save, _differentiate)
_sum_operator = operator("add_rms_norm", _add_forward, _save_sum, _differentiate_sum)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Divide the rows of `x` by their root mean square, and multiply by `offset + weight`."""
    return _operator(x, weight, float(eps), offset)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the norm of `x + residual`, and that sum."""
    return _sum_operator(x, residual, weight, float(eps), offset)  # type: ignore[no-any-return]
