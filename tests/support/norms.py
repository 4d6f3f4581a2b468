"""A norm, and kernels for it: one whose numbers do not move, and one whose reduction depends on the number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels_core import use_kernel_forward_from_hub


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Normalise rows with PyTorch's operator, which has all properties of numbers."""
    return nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def by_rows(x: torch.Tensor, weight: torch.Tensor, most: int = 64) -> torch.Tensor:
    """Normalise rows; of more than so many, sums are split."""
    if x.shape[:-1].numel() <= most:
        return norm(x, weight)
    mean = x.float().pow(2).unflatten(-1, (4, -1)).sum(-1).sum(-1, keepdim=True) / x.shape[-1]
    return (x * torch.rsqrt(mean + 1e-6) * weight).to(x.dtype)


@use_kernel_forward_from_hub("NumericsNorm")
class Norm(nn.Module):
    """The layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the reference."""
        return norm(x, self.weight)


class Steady(nn.Module):
    """A kernel that has all properties."""

    can_torch_compile = True

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        return norm(x, self.weight) * 1


class ByRows(nn.Module):
    """A kernel that is not batch-invariant."""

    can_torch_compile = True

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        return by_rows(x, self.weight)
