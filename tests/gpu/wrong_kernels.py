"""Triton kernels that scale a tensor, and are wrong on purpose in one way each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn


@triton.jit
def _scale(x, out, factor, offset, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    where = tl.program_id(0) * block + tl.arange(0, block)
    inside = where < n
    tl.store(out + where, tl.load(x + where, mask=inside) * factor + offset, mask=inside)


def launch(x: torch.Tensor, factor: float, offset: float = 0.0) -> torch.Tensor:
    """Return `x * factor + offset`, taking the memory of `x` as it lies."""
    out = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), 1024),)](x, out, factor, offset, x.numel(), block=1024)
    return out


class Scaled(torch.autograd.Function):
    """A product with a number, forward and backward in Triton."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float, offset: float, backward: float) -> torch.Tensor:
        """Launch, and remember what the backward multiplies with."""
        ctx.backward = backward
        return launch(x, factor, offset)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Launch."""
        return launch(gradients[0].contiguous(), ctx.backward), None, None, None


def right(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As it should be."""
    return Scaled.apply(x.contiguous(), 2.0, 0.0, 2.0)  # type: ignore[no-any-return]


def biased_in_bfloat16(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Adds a little, in bfloat16 only."""
    return Scaled.apply(x.contiguous(), 2.0, 0.05 * (x.dtype == torch.bfloat16), 2.0)  # type: ignore[no-any-return]


def wrong_for_strided(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Takes the memory of a transposed tensor as if it were contiguous."""
    flat = x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape).stride())
    return Scaled.apply(flat, 2.0, 0.0, 2.0)  # type: ignore[no-any-return]


def wrong_gradient(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Right forward, wrong backward."""
    return Scaled.apply(x.contiguous(), 2.0, 0.0, 3.0)  # type: ignore[no-any-return]


def missing_gradient(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Launches without telling autograd."""
    return launch(x.detach().contiguous(), 2.0)


def mutating(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Writes into its input, past autograd's counters."""
    out = right(self, x)
    flat = x.detach()
    _scale[(triton.cdiv(x.numel(), 1024),)](flat, flat, 2.0, 0.0, x.numel(), block=1024)
    return out
