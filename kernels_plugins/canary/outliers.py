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

from .reader import INFINITE, MINUS_INFINITE, NAN, READ, TENSORS, Place, Reader, Size, part_of

_FORMS = 64
"""Forms (dtypes, shapes, strides, modes) that a kernel has until only classes of these are distinguished: with lengths
that differ in each call, each call would be an outlier."""

_REAL = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool))
_REAL |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_CAST = frozenset((torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2))
_CAST |= {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
"""Dtypes that few operators know."""
_PLAIN = (torch.Tensor, nn.Parameter)
_WORDS = (bool, str, type(None), torch.dtype, torch.device)
_LEAVES = frozenset((*_PLAIN, *_WORDS, int, float))

Classes = dict[tuple[int, object], float | str]
"""The largest magnitudes of the tensors of a call, and infinities and NaN in them, by position and class."""


class Outliers:
    """Finds the outliers among the calls of one kernel, for one layer and device.

    Example:
        >>> outliers, x = Outliers(), torch.ones(4, 8)
        >>> outliers.find((x,)), outliers.find((x + 0.5,)), outliers.find((x[:2],))
        ('', '', 'it has other dtypes, shapes or strides, numbers or modes than before')
        >>> outliers.find((x * 1000,))
        'tensor 1 of its inputs reaches 1e+03, unlike before'
    """

    def __init__(self) -> None:
        self._forms: set[object] = set()
        self._exact = 0
        self._known: set[tuple[int, object]] = set()
        self._awaited: set[tuple[int, object]] = set()
        # Its methods are atomic: threads may call one kernel at the same time.
        self._pending: deque[tuple[list[tuple[int, Place]], bool]] = deque()
        self._calls = 0

    def find(self, values: Iterable[Any], compared: bool = False) -> str:
        """Return why a call is to be compared; empty if its inputs are like earlier ones, or are not plain tensors.

        Args:
            values: The arguments of the call.
            compared: Whether the call is compared in any case, so that its inputs are known from now on.
        """
        tensors: list[torch.Tensor] = []
        recording = torch.is_grad_enabled()
        form: list[object] = [recording]
        for value in _flat(values):
            if isinstance(value, torch.Tensor):
                if type(value) not in _PLAIN or value.layout is not torch.strided:
                    return ""  # a comparison may start a collective, and other ranks have other numbers
                dtype = value.dtype
                is_shifted = value.storage_offset() * dtype.itemsize % 16 != 0
                form.append((dtype, value.shape, value.stride(), is_shifted, value.requires_grad))
                if value.is_meta or not value.numel():
                    continue
                if dtype in _REAL:
                    tensors.append(value)
                elif dtype.is_complex:
                    tensors.append(torch.view_as_real(value.detach().resolve_conj()))
                elif dtype in _CAST:
                    tensors.append(value.detach().float())
            elif isinstance(value, nn.Module):
                form.append(recording and _trains(value))
            elif isinstance(value, _WORDS):
                form.append(value)
            else:
                form.append(_class_of_number(value) if isinstance(value, (int, float)) else type(value))
        if tensors:
            form.append(_autocast(tensors[0].device.type))
        first = not self._forms
        is_other = self._is_new(form) and not first
        why = "it has other dtypes, shapes or strides, numbers or modes than before" if is_other else ""
        self._look()
        sizes_why = self._find_sizes(tensors, compared or is_other) if tensors else ""
        return why or sizes_why

    def _look(self) -> None:
        """Take the magnitudes of earlier calls that are there by now."""
        while self._pending:
            try:
                places, was_compared = entry = self._pending.popleft()
            except IndexError:  # another thread has taken it
                return
            sizes = _classes_of(places, wait=False)
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
        first, waits = not self._known, bool(self._awaited)
        numbered = list(enumerate(tensors))
        if len(numbered) > TENSORS and not (compared or first or waits):
            start = self._calls * TENSORS % len(numbered)
            numbered = (numbered * 2)[start : start + TENSORS]
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for place in numbered:
            by_device.setdefault(place[1].device, []).append(place)
        here: list[tuple[int, Size]] = []
        later: list[tuple[int, Place]] = []
        for device, places in by_device.items():
            if not _is_late(device):
                here += [(position, _size_of(part_of(tensor, self._calls, READ))) for position, tensor in places]
                continue
            for start in range(0, len(places), TENSORS):
                positions, some = zip(*places[start : start + TENSORS], strict=True)
                # One that was seen in a part of a tensor is looked for in all of it.
                read = _reader(device).start(list(some), self._calls, whole=waits)
                later += zip(positions, read, strict=True)
        found = _classes(here)
        if waits:
            found |= _classes_of(later, wait=True) or {}
        new = found.keys() - self._known
        self._known |= new
        self._awaited -= new
        if later and not waits:
            self._pending.append((later, compared or first or bool(new)))
        if not new or first:
            return ""
        (position, _), size = next((key, found[key]) for key in found if key in new)
        holds = f"holds {size}" if isinstance(size, str) else f"reaches {size:.3g}"
        return f"tensor {position + 1} of its inputs {holds}, unlike before"


@functools.cache
def _reader(device: torch.device) -> Reader:
    """Return the reader of a device, which all kernels share: two may get the same tensor."""
    return Reader(device)


def _is_late(device: torch.device) -> bool:
    """Whether a device computes behind its host."""
    return device.type != "cpu"


def _size_of(tensor: torch.Tensor) -> Size:
    """Return the largest magnitude on a CPU, where the norm takes ten times as long."""
    tensor, special = tensor.detach(), 0
    least, most = _ends(tensor)
    if math.isnan(most):
        special = NAN
        tensor = torch.nan_to_num(tensor, 0.0, math.inf, -math.inf)
        least, most = _ends(tensor)
    if math.isinf(least) or math.isinf(most):
        special |= (INFINITE if most == math.inf else 0) | (MINUS_INFINITE if least == -math.inf else 0)
        least, most = _ends(torch.nan_to_num(tensor, 0.0, 0.0, 0.0))
    return max(abs(least), abs(most)), special


def _ends(tensor: torch.Tensor) -> tuple[float, float]:
    least, most = torch.aminmax(tensor)
    return least.item(), most.item()  # both are NaN if a number is


def _classes(sizes: Iterable[tuple[int, Size]]) -> Classes:
    """Put magnitudes into classes: zero, and one for each power of four; infinities and NaN have their own."""
    found: Classes = {}
    for position, (size, special) in sizes:
        if special:
            for flag, name in ((NAN, "NaN"), (INFINITE, "inf"), (MINUS_INFINITE, "-inf")):
                if special & flag:
                    found[position, name] = name
        # As text, for the number 0 is also the class of 1.
        found[position, math.frexp(size)[1] // 2 if size else "0"] = size
    return found


def _classes_of(places: list[tuple[int, Place]], *, wait: bool) -> Classes | None:
    """Return the classes of magnitudes; None while one of them is not there, unless this is to wait."""
    found: list[tuple[int, Size]] = []
    for position, (magnitudes, index) in places:
        sizes = magnitudes.sizes(wait=wait)
        if sizes is None:
            return None
        found.append((position, sizes[index]))
    return _classes(found)


def _class_of_number(number: float) -> str:
    """Return the type and sign of a number among the arguments, and the power of four."""
    size: object = number
    if number and -math.inf < number < math.inf:
        size = (number.bit_length() + 1 if isinstance(number, int) else math.frexp(number)[1]) // 2  # 0 is alone
    return f"{type(number).__name__} {number < 0} {size}"


def _autocast(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast for a type of device; None while it is off."""
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


@functools.cache
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _trains(module: nn.Module) -> bool:
    """Whether a parameter of a module requires grad; asks the dictionaries, for `parameters()` takes microseconds."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    return any(child is not None and _trains(child) for child in module._modules.values())


def _flat(values: Iterable[Any], within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Yield arguments, and the items of lists, tuples, dicts and dataclasses among them, with the keys of dicts.

    Of other objects, nothing: a cache would lead to the tensors of all layers.
    """
    for value in values:
        if type(value) in _LEAVES or isinstance(value, (torch.Tensor, nn.Module)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value, within)
        elif isinstance(value, dict):
            yield from value
            yield from _flat(value.values(), within)
        elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
            if id(value) not in within:  # one may refer to that which holds it
                fields = [getattr(value, name, None) for name in value.__dataclass_fields__]
                yield from _flat(fields, (*within, id(value)))
        else:
            yield value


def _class_of(form: object) -> object:
    """Return a coarser form of a tensor: sizes by power of two and by the powers of two that divide them.

    Of strides: their order, and where they leave gaps, by the powers of two that divide these.
    """
    if not isinstance(form, tuple):
        return form
    dtype, shape, stride, is_shifted, recorded = form
    sizes = tuple((size.bit_length(), min(size & -size, 16)) for size in shape)
    order = tuple(sorted(range(len(stride)), key=lambda place: -stride[place]))
    dense, gaps = 1, []
    for place in reversed(order):
        if stride[place] and shape[place] > 1:
            gaps.append(min(stride[place] & -stride[place], 16) if stride[place] != dense else 0)
            dense = stride[place] * shape[place]
    return dtype, sizes, order, tuple(gaps), 0 in stride, is_shifted, recorded
