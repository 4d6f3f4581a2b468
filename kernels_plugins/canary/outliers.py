"""Outliers: the calls of one kernel whose inputs are unlike those of its earlier calls.

Dtypes, shapes and strides are known on the host. Magnitudes are not, and waiting for them would stop a device that
runs behind its host. So they are computed on the device, beside the call, and looked at in later calls, once they are
there. For a magnitude that is new, that is too late: the call is over. From then on, each call waits for its own
magnitudes, until the new one has come again and was compared.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .reader import READ, TENSORS, Place, Reader, part_of

_FORMS = 64
"""Forms (dtypes, shapes, strides) that a kernel has until only classes of forms are told apart: with lengths that
differ in each call, each call would be an outlier."""

_REAL = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool))
_REAL |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_PLAIN = (torch.Tensor, nn.Parameter)
_WORDS = (bool, str, type(None))

Sizes = dict[tuple[int, object], float]
"""Largest magnitudes of the tensors of a call, by position and class of magnitude."""


class Outliers:
    """Finds the outliers among the calls of one kernel, for one layer and device.

    Example:
        >>> outliers, x = Outliers(), torch.ones(4, 8)
        >>> outliers.find((x,)), outliers.find((x + 0.5,)), outliers.find((x[:2],))
        ('', '', 'its inputs have other dtypes, shapes or strides than before')
        >>> outliers.find((x * 1000,))
        'tensor 1 of its inputs reaches 1e+03, unlike before'
    """

    def __init__(self) -> None:
        self._forms: set[object] = set()
        self._exact = 0
        self._known: set[tuple[int, object]] = set()
        self._awaited: set[tuple[int, object]] = set()
        # Its methods are atomic: threads may call one kernel at the same time.
        self._pending: deque[tuple[list[Place], bool]] = deque()
        self._calls = 0

    def find(self, values: Iterable[Any], compared: bool = False) -> str:
        """Return why a call is to be compared; empty if its inputs are like earlier ones, or are not plain tensors.

        Args:
            values: The arguments of the call.
            compared: Whether the call is compared in any case, so that its inputs are known from now on.
        """
        tensors: list[torch.Tensor] = []
        form: list[object] = []
        for value in _flat(values):
            if isinstance(value, torch.Tensor):
                if type(value) not in _PLAIN or value.layout is not torch.strided:
                    return ""  # a comparison may start a collective, and other ranks have other numbers
                form.append((value.dtype, value.shape, value.stride(), value.requires_grad))
                if value.dtype in _REAL:
                    if value.numel():
                        tensors.append(value)
                elif value.dtype.is_complex and value.numel():
                    tensors.append(torch.view_as_real(value.detach().resolve_conj()))
            else:
                form.append(value if isinstance(value, _WORDS) else type(value))
        first = not self._forms
        why = "its inputs have other dtypes, shapes or strides than before" if self._is_new(form) and not first else ""
        self._look()
        sizes_why = self._find_sizes(tensors[:TENSORS], compared or bool(why)) if tensors else ""
        return why or sizes_why

    def _look(self) -> None:
        """Take the magnitudes of earlier calls that are there by now."""
        while self._pending:
            try:
                places, was_compared = entry = self._pending.popleft()
            except IndexError:  # another thread has taken it
                return
            sizes = _sizes_of(places, wait=False)
            if sizes is None:
                self._pending.appendleft(entry)
                return
            if new := sizes.keys() - self._known:
                (self._known if was_compared or not self._known else self._awaited).update(new)

    def _is_new(self, form: list[object]) -> bool:
        exact = tuple(form)
        if exact in self._forms:
            return False
        coarse = tuple(map(_class_of, form))
        new = coarse not in self._forms or self._exact < _FORMS
        self._forms.add(coarse)
        if self._exact < _FORMS:
            self._exact += 1
            self._forms.add(exact)
        return new

    def _find_sizes(self, tensors: list[torch.Tensor], compared: bool) -> str:
        """Look at the magnitudes now, on a CPU or where one is awaited; else start to compute them."""
        self._calls += 1
        device = tensors[0].device
        here = [tensor for tensor in tensors if tensor.device == device]
        if not _is_late(device):
            sizes = _classes(_largest(part_of(tensor, self._calls, READ)) for tensor in here)
        else:
            # One that was seen in a part of a tensor is looked for in all of it.
            places = _reader(device).start(here, self._calls, whole=bool(self._awaited))
            if not self._awaited:
                self._pending.append((places, compared))
                return ""
            sizes = _sizes_of(places, wait=True) or {}
        new = sizes.keys() - self._known
        first = not self._known
        self._known |= new
        self._awaited -= new
        if not new or first:
            return ""
        (position, _), size = next((key, sizes[key]) for key in sizes if key in new)
        holds = "holds NaN" if math.isnan(size) else f"reaches {size:.3g}"
        return f"tensor {position + 1} of its inputs {holds}, unlike before"


@functools.cache
def _reader(device: torch.device) -> Reader:
    """Return the reader of a device, which all kernels share: two may get the same tensor."""
    return Reader(device)


def _is_late(device: torch.device) -> bool:
    """Whether a device computes behind its host."""
    return device.type != "cpu"


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest magnitude on a CPU, where the norm takes ten times as long."""
    least, largest = torch.aminmax(tensor.detach())
    return max(abs(least.item()), abs(largest.item()))  # both are NaN if a number is


def _classes(sizes: Iterable[float]) -> Sizes:
    """Put magnitudes into classes: zero, infinite, NaN, and one for each power of four."""
    found: Sizes = {}
    for position, size in enumerate(sizes):
        is_usual = 0 < size < math.inf
        # As text, for the number 0 is also the class of 1.
        found[position, math.frexp(size)[1] // 2 if is_usual else str(size)] = size
    return found


def _sizes_of(places: list[Place], *, wait: bool) -> Sizes | None:
    """Return the classes of magnitudes; None while one of them is not there, unless this is to wait."""
    found: list[float] = []
    for magnitudes, index in places:
        sizes = magnitudes.sizes(wait=wait)
        if sizes is None:
            return None
        found.append(sizes[index])
    return _classes(found)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield arguments, and the items of lists, tuples and dicts among them, with the keys of these; no modules."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from value
            yield from _flat(value.values())
        elif not isinstance(value, nn.Module):
            yield value


def _class_of(form: object) -> object:
    """Return a coarser form of a tensor: sizes by power of two and by the powers of two that divide them."""
    if not isinstance(form, tuple):
        return form
    dtype, shape, stride, recorded = form
    sizes = tuple((size.bit_length(), min(size & -size, 16)) for size in shape)
    order = tuple(sorted(range(len(stride)), key=lambda place: -stride[place]))
    return dtype, sizes, order, bool(stride) and stride[-1] == 1, 0 in stride, recorded
