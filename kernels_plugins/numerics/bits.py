"""Two results, compared bit by bit."""

from __future__ import annotations

from typing import Any

import torch

from kernels_core.replay import leaves

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""For each size of an element: the integers that have the same bits."""


def tensors_of(value: object) -> dict[str, torch.Tensor]:
    """Return the tensors in a nested value, by path."""
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, torch.Tensor)}


def differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return where the bits of two tensors differ, as booleans; any two NaN are equal here, 0 and -0 are not.

    Args:
        one: A tensor of any strided shape.
        other: Another of the same shape and dtype.

    Example:
        >>> differing(torch.tensor([0.0, 1.0, torch.nan]), torch.tensor([-0.0, 1.0, torch.nan]))
        tensor([ True, False, False])
    """
    if one.is_complex():
        parts = differing(*(torch.view_as_real(each.resolve_conj()) for each in (one, other)))
        return parts.any(-1)
    if one.dtype is torch.bool:
        return one != other
    return (_bits(one) != _bits(other)) & ~((one != one) & (other != other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.itemsize])


def difference(one: Any, other: Any) -> str:
    """Describe how two nested results differ in their bits; empty if they do not."""
    ours, theirs = tensors_of(one), tensors_of(other)
    if ours.keys() != theirs.keys():
        return "other tensors are returned"
    texts = []
    for path, tensor in ours.items():
        if tensor.shape != theirs[path].shape or tensor.dtype is not theirs[path].dtype:
            texts.append(f"{path or 'the output'} has another shape or dtype")
        elif (differ := differing(tensor, theirs[path])).any():
            texts.append(
                f"{f'{path}: ' if path else ''}{size_of(tensor[differ], theirs[path][differ], tensor.numel())}"
            )
    return "; ".join(texts)


def size_of(one: torch.Tensor, other: torch.Tensor, total: int) -> str:
    """Describe numbers that differ: how many of a total, by how much, and in units in the last place."""
    text = f"{one.numel():,} of {total:,} elements differ"
    if not one.is_floating_point():
        return text
    gap = (one.double() - other.double()).abs()
    finite = gap[gap.isfinite()]
    if finite.numel() < gap.numel():
        return f"{text}, some in being finite"
    return f"{text}, at most {float(finite.max()):.2g} and {int(steps(_bits(one), _bits(other)).max()):,} ulps"


def steps(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return how many numbers of a dtype lie between two, from their bits.

    The bits of negative numbers count down from the lowest integer: mirrored there, all numbers are in their order.
    """
    lowest = -(2 ** (8 * ours.element_size() - 1)) if ours.dtype.is_signed else 128  # bytes have no sign
    places = []
    for bits in (ours.long(), theirs.long()):
        is_negative = bits < 0 if ours.dtype.is_signed else bits >= lowest
        places.append(torch.where(is_negative, lowest - bits, bits))
    return (places[0] - places[1]).abs()
