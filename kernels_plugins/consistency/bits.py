"""The bits of tensors: a digest in place of the numbers, and the difference of two tensors in units in the last place.

A digest is a sum of all bits with a random odd weight for each place, modulo 2**64: it is computed on the device of the
tensor in any order, so it is the same in each run, and a single number that differs always changes it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..numerics.bits import INTEGERS, steps

_PIECE = 2**16
"""Numbers of a row whose bits are summed at once."""
_ROWS = 16
"""Rows at once: with the piece, this bounds the memory of a digest to some times eight megabytes."""

_FACTOR = 0x9E3779B97F4A7C15 - 2**64
"""Odd: multiplies the sum of the pieces before."""


@functools.lru_cache(maxsize=4)
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False):
        weights = torch.randint(-(2**62), 2**62, (_PIECE,), generator=generator, device="cpu")
        return (weights * 2 + 1).to(device)


def has_bits(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its numbers in one piece of memory, or is a distributed one with such a part."""
    is_known = type(tensor) in (torch.Tensor, torch.nn.Parameter) or hasattr(type(tensor), "placements")
    return is_known and tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as integers with the same bits; of a distributed tensor, the part of this rank.

    Example:
        >>> as_bits(torch.tensor([0.0, -0.0])).tolist()
        [0, -2147483648]
    """
    if hasattr(type(tensor), "placements"):
        tensor = cast(Any, tensor).to_local()
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(INTEGERS[tensor.element_size()])


def digest(tensor: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Return a digest of each of so many equal parts of the first dimension, on the device of the tensor.

    Args:
        tensor: The tensor.
        rows: The number of parts; the first dimension is a multiple of it.

    Returns:
        Integers, one for each part.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> digest(x, 2).tolist() == [digest(x[:1]).item(), digest(x[1:]).item()]
        True
    """
    if tensor.numel() == 0:
        return torch.zeros(rows, dtype=torch.int64, device=tensor.device)
    with torch.no_grad():
        bits: Any = as_bits(tensor).reshape(rows, -1)
        weights = _weights(bits.device)
        found = []
        for group in bits.split(_ROWS):
            total = torch.zeros(len(group), dtype=torch.int64, device=bits.device)
            for piece in group.split(_PIECE, dim=1):
                total = total * _FACTOR + (piece.long() * weights[: piece.shape[1]]).sum(1)
            found.append(total)
        return torch.cat(found)


@dataclass(frozen=True)
class Gap:
    """The difference of two tensors of one shape.

    Attributes:
        elements: How many numbers have other bits.
        total: How many there are.
        ulps: The largest difference in units in the last place; infinite where one is NaN; None for dtypes that differ,
            and for integers.
        largest: The largest absolute difference.
        values: Both numbers where they differ most.
        index: The place of these.
    """

    elements: int
    total: int
    ulps: float | None
    largest: float
    values: tuple[float, float]
    index: tuple[int, ...]


def gap(a: torch.Tensor, b: torch.Tensor) -> Gap | None:
    """Measure the difference of two tensors; None if their bits are the same.

    Example:
        >>> x = torch.ones(3)
        >>> y = torch.tensor([1.0, 1.0, 1.0 + 2**-22])
        >>> found = gap(x, y)
        >>> found.elements, found.ulps, found.index
        (1, 2, (2,))
    """
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.is_complex() and b.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    wide, other = a.double(), b.double()
    ulps: torch.Tensor | None = None
    if a.dtype is b.dtype:
        ours, theirs = as_bits(a), as_bits(b)
        differs = ours != theirs
        if a.dtype.is_floating_point and not ((wide.isnan() | other.isnan()) & differs).any():
            ulps = steps(ours, theirs)
    else:
        differs = torch.ones_like(wide, dtype=torch.bool)  # all bits, also of equal numbers
    elements = int(differs.sum())
    if not elements:
        return None
    distance = torch.where(differs, (wide - other).abs().nan_to_num(nan=math.inf), -1.0)
    place = int((distance if ulps is None else ulps).argmax())
    is_nan = a.dtype is b.dtype and a.dtype.is_floating_point
    return Gap(
        elements,
        a.numel(),
        int(ulps.max()) if ulps is not None else math.inf if is_nan else None,
        float(distance.max()),
        (float(wide.flatten()[place]), float(other.flatten()[place])),
        tuple(int(i) for i in torch.unravel_index(torch.tensor(place, device="cpu"), a.shape)),
    )
