"""A quick look at whether nested outputs are alike, for models that train meanwhile.

`compare` measures how they differ: about seventy operations for each tensor, and it waits for each. `alike` gives a
device about twenty for each, and waits once for all. It accuses no kernel: outputs that are not alike are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from kernels_core.replay import leaves

from .structure import metadata_mismatch, own_part, structure_mismatches, value_mismatches
from .tolerance import Yardstick, norm, tolerance_of, widest


def alike(pairs: Iterable[tuple[object, object]], same: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()) -> bool:
    """Return whether `compare(actual, expected, quick=True)` would surely find nothing, in any pair.

    Args:
        pairs: Nested values, and those from the reference.
        same: Tensors that must be equal, number by number.

    Returns:
        False also where that is not certain: for NaN and infinity, and for complex, sparse and quantized tensors.

    Example:
        >>> alike([(torch.ones(3), torch.ones(3) + 1e-7)]), alike([(torch.ones(3), torch.zeros(3))])
        (True, False)
    """
    screens: list[_Equal] = []
    with torch.inference_mode(False), torch.no_grad():
        for actual, expected in pairs:
            if structure_mismatches(actual, expected):
                return False
            for (_, ours), (_, theirs) in zip(leaves(actual), leaves(expected), strict=True):
                if not isinstance(theirs, torch.Tensor):
                    if value_mismatches("", ours, theirs):
                        return False
                    continue
                if not _is_comparable(ours, theirs):
                    return False
                ours, theirs = own_part(ours, theirs), own_part(theirs, theirs)
                if theirs.numel():  # an empty tensor has no largest error
                    screens.append((_Near if theirs.dtype.is_floating_point else _Equal)(ours, theirs))
        for ours, theirs in same:
            if not _is_comparable(ours, theirs):
                return False
            screens.append(_Equal(own_part(ours, theirs), own_part(theirs, theirs)))
        found = _waited_for([screen.statistics for screen in screens])
    return all(screen.passes(*numbers) for screen, numbers in zip(screens, found, strict=True))


def _is_comparable(ours: object, theirs: torch.Tensor) -> bool:
    return metadata_mismatch("", ours, theirs) is None and all(
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_complex() or tensor.is_quantized)
        for tensor in (ours, theirs)
    )


def _waited_for(tensors: Sequence[torch.Tensor]) -> Iterator[list[float]]:
    """Yield the numbers of each tensor; each device is waited for once."""
    numbers = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        numbers[device] = iter(torch.cat([tensor for tensor in tensors if tensor.device == device]).tolist())
    for tensor in tensors:
        yield [next(numbers[tensor.device]) for _ in range(tensor.numel())]


class _Equal:
    """Two tensors that must be equal."""

    def __init__(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        self.statistics = (ours != theirs).any()[None].to(widest(ours))  # not `equal`, which would wait for the device

    def passes(self, *statistics: float) -> bool:
        return not any(statistics)


class _Near(_Equal):
    """Two tensors whose numbers must be as near to each other as `compare` demands."""

    def __init__(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        self.yardstick = Yardstick(theirs, tolerance_of(theirs.dtype))
        self.count = theirs.numel()
        work, double = torch.promote_types(theirs.dtype, torch.float32), widest(theirs)  # float64 stays float64
        target = theirs.detach().to(work)
        error = ours.detach().to(work) - target
        along = (error * target.sign()).sum(dtype=double)
        size = target.abs()
        scale = norm(target).div_(math.sqrt(self.count))
        limit = torch.maximum(size, scale.to(work))
        limit = limit.mul_(self.yardstick.relative(exact=False)).add_(self.yardstick.atol)
        self.statistics = torch.stack(
            [
                (error.abs() / limit).max().to(double),
                error.sum(dtype=double),
                along,
                size.sum(dtype=double),
                norm(error).to(double),
            ]
        )

    def passes(self, *statistics: float) -> bool:
        excess, bias, along, size, length = statistics
        if not excess <= 1:  # also for NaN
            return False
        n = self.count
        return self.yardstick.bias(n, bias / n, along / n, size / n, length / math.sqrt(n))[0] <= 1
