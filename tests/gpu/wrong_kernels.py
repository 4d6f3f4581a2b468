"""Triton kernels that scale the columns of a matrix by weights, and are wrong on purpose in one way each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

BLOCK = 1024


@triton.jit
def _scale(x, weight, out, offset, n, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    where = tl.program_id(0) * block + tl.arange(0, block)
    inside = where < n
    factor = tl.load(weight + where % columns, mask=inside)
    tl.store(out + where, tl.load(x + where, mask=inside) * factor + offset, mask=inside)


def launch(x: torch.Tensor, weight: torch.Tensor, offset: float = 0.0, *, left_out: int = 0) -> torch.Tensor:
    """Return `x * weight + offset` for contiguous memory, without the last blocks if some are left out."""
    out = torch.zeros_like(x)
    blocks = triton.cdiv(x.numel(), BLOCK) - left_out
    if blocks > 0:
        _scale[(blocks,)](x, weight, out, offset, x.numel(), x.shape[-1], block=BLOCK)
    return out


class Scaled(torch.autograd.Function):
    """The columns of a matrix times weights, forward and backward in Triton."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offset: float, error: float) -> torch.Tensor:
        """Launch, and remember how wrong the gradient of the weight shall be."""
        ctx.save_for_backward(x, weight)
        ctx.error = error
        return launch(x, weight, offset)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Launch."""
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        gradient = gradient.contiguous()
        columns = (gradient.float() * x.float()).sum(0).to(weight.dtype)
        return launch(gradient, weight), columns * (1 + ctx.error), None, None


def scaled(self: Any, x: torch.Tensor, offset: float = 0.0, error: float = 0.0) -> torch.Tensor:
    """Scale by the weights of a layer."""
    return Scaled.apply(x.contiguous(), self.weight, offset, error)  # type: ignore[no-any-return]


def right(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As it should be."""
    return scaled(self, x)


def biased_in_bfloat16(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Adds a little, in bfloat16 only."""
    return scaled(self, x, 0.05 * (x.dtype == torch.bfloat16))


def wrong_for_strided(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Takes the memory of a tensor with gaps, or transposed, as if there were none."""
    flat = x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return Scaled.apply(flat.clone(), self.weight, 0.0, 0.0)  # type: ignore[no-any-return]


def wrong_gradient(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Right forward, and a wrong gradient of the weight."""
    return scaled(self, x, error=0.5)


def missing_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Launches without telling autograd."""
    return launch(x.detach().contiguous(), self.weight.detach())


def mutating(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Writes into its input, past autograd's counters."""
    out = right(self, x)
    flat = x.detach()
    if x.is_contiguous() and x.numel():
        _scale[(triton.cdiv(x.numel(), BLOCK),)](
            flat, self.weight.detach(), flat, 1.0, x.numel(), x.shape[-1], block=BLOCK
        )
    return out


def make_stateful() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Make a kernel that adds on each call the sum of the calls before."""
    calls: list[int] = []

    def stateful(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return scaled(self, x, 0.5 * (len(calls) - 1))

    return stateful


def make_late(call: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """Make a kernel that is wrong from a call on."""
    calls: list[int] = []

    def late(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return scaled(self, x, 0.5 * (len(calls) >= call))

    return late


def wrong_when_compiled(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Leaves the last block out, under `torch.compile` only; has no backward."""
    return launch(x, self.weight, left_out=int(torch.compiler.is_compiling()))
