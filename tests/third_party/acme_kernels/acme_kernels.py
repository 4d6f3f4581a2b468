"""Kernels of the Acme company: a plugin package such as third parties write, on public names only."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn

from kernels_core import Candidate, LayerRequest, Resolution, hookimpl

kernels_priority = 10

decisions: list[str] = []


class AcmeTriple(nn.Module):
    """Multiply by three; the reference that it serves multiplies by something else, to tell them apart."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return three times `x`."""
        return x * 3


class UntrustedTriple(nn.Module):
    """A kernel that Acme's own policy does not let run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return nonsense."""
        return x * float("nan")


@hookimpl
def kernels_mapping() -> Mapping[str, Mapping[Any, Any]]:
    """Bring two kernels for one layer, the worse one first."""
    return {"Triple": {"cpu": [UntrustedTriple, AcmeTriple]}}


@hookimpl
def kernels_authorize(request: LayerRequest, candidate: Candidate) -> str | None:
    """Refuse one of the two."""
    return "acme does not trust this one" if candidate.source is UntrustedTriple else None


@hookimpl(wrapper=True)
def kernels_resolve_forward(request: LayerRequest) -> Generator[None, Resolution, Resolution]:
    """Write down every decision."""
    resolution = yield
    decisions.append(f"{request.layer_name}: {resolution.origin}")
    return resolution
