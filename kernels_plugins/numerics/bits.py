"""Two results, compared bit by bit."""

from __future__ import annotations

from typing import Any

import torch

from kernels_core.replay import leaves

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    integer = _INTEGERS[one.itemsize]
    differ = one.contiguous().view(integer) != other.contiguous().view(integer)
    return differ & ~((one != one) & (other != other))


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
    return f"{text}, at most {float(finite.max()):.2g} and {int(_steps(one, other).max()):,} ulps"


def _steps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return how many numbers of the dtype lie between two, for each pair."""
    integer = _INTEGERS[one.itemsize]
    if integer is torch.uint8:  # of 8 bits, equal ones would be rare
        return torch.ones_like(one, dtype=torch.int64)
    lowest = torch.iinfo(integer).min
    places = []
    for each in (one, other):  # bits of negative numbers grow downwards
        bits = each.contiguous().view(integer).to(torch.int64)
        places.append(torch.where(bits < 0, lowest - bits, bits))
    return (places[0] - places[1]).abs()
