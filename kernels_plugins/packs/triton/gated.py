"""Gated activations: `activation(gate) * up`, each direction in one pass over memory.

Gate and up are two tensors, or the two halves of the rows of one. The activation is rounded to the dtype before the
product, as it is where PyTorch computes them one after the other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launcher, as_rows, new_rows, operator, power_of_two

SILU, GELU, GELU_TANH = 0, 1, 2

# Numbers that a program computes. The forward of GELU computes enough to gain from a second independent row.
BLOCK = 1024
GELU_BLOCK = 2048

_FREE = ["rows"]


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
def _tanh_weight(x):
    """The factor of x in GELU by tanh: 0.5 * (1 + tanh(u)) is the sigmoid of 2 * u."""
    return _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def _activation(x, KIND: tl.constexpr):
    if KIND == 0:
        return x * _sigmoid(x)
    if KIND == 1:
        return x * _normal_cdf(x)
    return x * _tanh_weight(x)


@triton.jit
def _derivative(x, KIND: tl.constexpr):
    if KIND == 0:
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if KIND == 1:
        return _normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    s = _tanh_weight(x)
    return s * (1.0 + x * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))


@triton.jit
def _forward_block(
    gate_ptr, up_ptr, y_ptr, rows, gate_stride, up_stride, columns,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    block = tl.program_id(0)
    row = (block // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (block % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(dtype)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(dtype)
    activated = _activation(gate, KIND).to(y_ptr.dtype.element_ty).to(dtype)
    tl.store(y_ptr + row * columns + column, (activated * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_block(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, rows, gate_stride, up_stride, dy_stride, out_stride, columns,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if dgate_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    block = tl.program_id(0)
    row = (block // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (block % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(dtype)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(dtype)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(dtype)
    activated = _activation(gate, KIND).to(dgate_ptr.dtype.element_ty).to(dtype)
    dgate = dy * up * _derivative(gate, KIND)
    out = row * out_stride + column
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, (dy * activated).to(dup_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FREE)
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, rows, gate_stride, up_stride, columns,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    _forward_block(gate_ptr, up_ptr, y_ptr, rows, gate_stride, up_stride, columns, KIND, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=_FREE)
def _packed_forward_kernel(
    x_ptr, y_ptr, rows, stride, columns, KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    _forward_block(x_ptr, x_ptr + columns, y_ptr, rows, stride, stride, columns, KIND, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=_FREE)
def _backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, rows, gate_stride, up_stride, dy_stride, columns,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    _backward_block(
        gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, rows, gate_stride, up_stride, dy_stride, columns, columns,
        KIND, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def _packed_backward_kernel(
    x_ptr, dy_ptr, dx_ptr, rows, stride, dy_stride, columns,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    _backward_block(
        x_ptr, x_ptr + columns, dy_ptr, dx_ptr, dx_ptr + columns, rows, stride, stride, dy_stride, columns * 2, columns,
        KIND, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


_launch_forward = Launcher(_forward_kernel)
_launch_packed_forward = Launcher(_packed_forward_kernel)
_launch_backward = Launcher(_backward_kernel)
_launch_packed_backward = Launcher(_packed_backward_kernel)


def _blocks(rows: int, columns: int, size: int) -> tuple[int, int, int]:
    """Return the number of blocks, and the rows and columns of each."""
    width = power_of_two(columns, BLOCK)
    height = size // width
    return -(-rows // height) * -(-columns // width), height, width


def _forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype:  # a kernel would read past the end
        raise ValueError(f"gate and up differ: {tuple(gate.shape)} of {gate.dtype}, {tuple(up.shape)} of {up.dtype}")
    y = new_rows(gate, gate.dtype)
    if y.numel() == 0:
        return y
    gate, rows, columns, gate_stride = as_rows(gate)
    up, _, _, up_stride = as_rows(up)
    programs, *block = _blocks(rows, columns, GELU_BLOCK if kind else BLOCK)
    _launch_forward(programs, 4, (gate, up, y), (rows,), (gate_stride, up_stride, columns), (kind, *block))
    return y


def _packed_forward(x: Tensor, kind: int) -> Tensor:
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, rows, _, stride = as_rows(x)
    programs, *block = _blocks(rows, columns, GELU_BLOCK if kind else BLOCK)
    _launch_packed_forward(programs, 4, (x, y), (rows,), (stride, columns), (kind, *block))
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    dgate, dup = new_rows(gate, gate.dtype), new_rows(up, up.dtype)
    if dgate.numel() == 0:
        return dgate, dup
    gate, rows, columns, gate_stride = as_rows(gate)
    up, _, _, up_stride = as_rows(up)
    dy, _, _, dy_stride = as_rows(dy)
    programs, *block = _blocks(rows, columns, BLOCK)
    strides = (gate_stride, up_stride, dy_stride)
    _launch_backward(programs, 4, (gate, up, dy, dgate, dup), (rows,), (*strides, columns), (kind, *block))
    return dgate, dup


def _packed_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    dx = new_rows(x, x.dtype)
    if dx.numel() == 0:
        return dx
    x, rows, _, stride = as_rows(x)
    dy, _, columns, dy_stride = as_rows(dy)
    programs, *block = _blocks(rows, columns, BLOCK)
    _launch_packed_backward(programs, 4, (x, dy, dx), (rows,), (stride, dy_stride, columns), (kind, *block))
    return dx


_gradient = operator("gated_backward", _backward)
_packed_gradient = operator("packed_gated_backward", _packed_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradient(dy, *ctx.saved_tensors, ctx.kind), None


def _differentiate_packed(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _packed_gradient(dy, *ctx.saved_tensors, ctx.kind), None


_operator = operator("gated", _forward, _save, _differentiate)
_packed_operator = operator("packed_gated", _packed_forward, _save, _differentiate_packed)


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """Return `activation(gate) * up`; `kind` is SILU, GELU or GELU_TANH."""
    return _operator(gate, up, kind)  # type: ignore[no-any-return]


def packed_gated(x: Tensor, kind: int) -> Tensor:
    """Return `activation(gate) * up` for rows of which the first half is the gate."""
    return _packed_operator(x, kind)  # type: ignore[no-any-return]
