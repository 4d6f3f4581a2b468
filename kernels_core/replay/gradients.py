"""Gradients of a run, for gradients of its outputs that are the same in every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ..nested import leaves


class _Computed(torch.autograd.Function):
    """The same numbers, as the result of a computation."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data  # no view: a view of a leaf cannot be written to

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is no leaf, so that it can be written to while autograd records."""
    with torch.enable_grad():
        return cast(torch.Tensor, cast(Any, _Computed).apply(tensor))


def gradients_of(
    outputs: Any, sources: Mapping[str, torch.Tensor], seed: int, contiguous: bool
) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the sources, for fixed gradients of the outputs."""
    tensors = [leaf for _, leaf in leaves(outputs) if isinstance(leaf, torch.Tensor)] if sources else []
    # The gradient of a distributed tensor has to be one, too: that of the part that this rank holds is a plain one.
    with torch.enable_grad():
        tensors = [cast(Any, leaf).to_local() if hasattr(type(leaf), "placements") else leaf for leaf in tensors]
    reached = {number: output for number, output in enumerate(tensors) if output.requires_grad}
    if not reached:
        return dict.fromkeys(sources)
    # Two equal outputs get different gradients.
    pushed = [_output_gradient(output, seed + 1009 * number, contiguous) for number, output in reached.items()]
    found = torch.autograd.grad(list(reached.values()), list(sources.values()), pushed, allow_unused=True)
    return {name: g.detach() if g is not None else None for name, g in zip(sources, found, strict=True)}


def _output_gradient(output: torch.Tensor, seed: int, contiguous: bool) -> torch.Tensor:
    """Make numbers that are the same in every dtype: bfloat16 holds all of them."""
    generator = torch.Generator(output.device).manual_seed(seed)  # of its own: the run must not draw other numbers
    shape = (*output.shape, 2) if output.is_complex() else tuple(output.shape)
    numbers = torch.randn(shape, generator=generator, device=output.device, dtype=torch.float32)
    numbers = numbers.to(torch.bfloat16).float()
    gradient = (torch.view_as_complex(numbers) if output.is_complex() else numbers).to(output.dtype)
    if contiguous or gradient.dim() == 0:
        return gradient
    # A backward that takes the memory to be contiguous reads NaN.
    return torch.stack([gradient, torch.full_like(gradient, torch.nan)], -1)[..., 0]
