# SPDX-License-Identifier: Apache-2.0
"""`silu(a) * b` for `x = [a, b]`, in CUDA C++."""

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("silu_and_mul"))
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.register_fake(add_op_namespace_prefix("silu_and_mul_backward"))
def _(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return ops.silu_and_mul_backward(dy, *ctx.saved_tensors)


def _refuse(ctx: Any, ddx: Tensor) -> None:
    raise NotImplementedError("silu_and_mul has no second derivative")


torch.library.register_autograd(add_op_namespace_prefix("silu_and_mul"), _backward, setup_context=_setup_context)
torch.library.register_autograd(add_op_namespace_prefix("silu_and_mul_backward"), _refuse)


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns `silu(a) * b` for `x = [a, b]` along the last dimension."""
    return ops.silu_and_mul(x)


from . import layers  # noqa: E402 (it imports silu_and_mul from here)

__all__ = ["layers", "silu_and_mul"]
