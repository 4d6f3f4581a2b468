"""Outliers: the calls of one kernel whose inputs are unlike those of its earlier calls.

Dtypes, shapes and strides are known on the host. Magnitudes are not, and waiting for them would stop a device that
runs behind its host. So they are computed on the device, beside the call, and read at the next call, when they have
long arrived. For a magnitude that is new, that is too late: the call is over. From then on, each call waits for its
own magnitudes, until the new one has come again and was compared. So an outlier is compared at its second occurrence at
the latest, and which calls are compared depends on their inputs only, on no race: ranks with the same inputs agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

_FORMS = 64
"""Forms (dtypes, shapes, strides) that a kernel has until only classes of forms are told apart: with lengths that
differ in each call, each call would be an outlier."""

_READ = 2**24
"""Numbers of a tensor that are read in each call: rows at a distance of a larger one, other rows each time."""

_TENSORS = 16
"""Tensors of a call whose magnitudes are read."""

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
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
        # Lists, for `append` and `pop` are atomic: threads may call one kernel at the same time.
        self._pending: list[tuple[_Cells, bool]] = []
        self._free: list[_Cells] = []
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
                if value.dtype.is_complex and value.numel():
                    tensors.append(torch.view_as_real(value.detach().resolve_conj()))
                elif value.dtype in (*_FLOATING, *_WHOLE) and value.numel():
                    tensors.append(value)
            else:
                form.append(value if isinstance(value, _WORDS) else type(value))
        first = not self._forms
        why = "its inputs have other dtypes, shapes or strides than before" if self._is_new(form) and not first else ""
        while self._pending:
            try:
                cells, was_compared = self._pending.pop()
            except IndexError:  # another thread has taken it
                break
            sizes = cells.read()
            self._free.append(cells)
            if new := sizes.keys() - self._known:
                (self._known if was_compared or not self._known else self._awaited).update(new)
        sizes_why = self._find_sizes(tensors[:_TENSORS], compared or bool(why)) if tensors else ""
        return why or sizes_why

    def _is_new(self, form: list[object]) -> bool:
        exact, coarse = tuple(form), tuple(map(_class_of, form))
        if exact in self._forms:
            return False
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
        parts = [part_of(tensor, self._calls, _READ) for tensor in tensors if tensor.device == device]
        if not _is_late(device):
            sizes = _classes(_largest(part) for part in parts)
        else:
            cells = self._free.pop() if self._free else _Cells(device)
            cells.start(parts)
            if not self._awaited:
                self._pending.append((cells, compared))
                return ""
            sizes = cells.read()
            self._free.append(cells)
        new = sizes.keys() - self._known
        first = not self._known
        self._known |= new
        self._awaited -= new
        if not new or first:
            return ""
        (position, _), size = next((key, sizes[key]) for key in sizes if key in new)
        holds = "holds NaN" if math.isnan(size) else f"reaches {size:.3g}"
        return f"tensor {position + 1} of its inputs {holds}, unlike before"


class _Cells:
    """Magnitudes that a device computes, and their copy for the host."""

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device.type)
        self._device = device
        has_events = device.type != "cpu" and hasattr(self._module, "Event")  # none on MPS: reading waits there
        self._event = self._module.Event() if has_events else None
        with torch.inference_mode(False):
            self._there = torch.zeros(_TENSORS, device=device)
            self._here = torch.zeros(_TENSORS, pin_memory=True) if has_events else self._there
        self._cells = self._there.unbind()
        self._count = 0

    def start(self, tensors: list[torch.Tensor]) -> None:
        """Compute the magnitudes of tensors, without waiting."""
        self._count = len(tensors)
        with torch.no_grad():  # `out` is not for autograd, and autocast makes no copies with it
            for tensor, cell in zip(tensors, self._cells, strict=False):
                if tensor.dtype in _WHOLE:  # such as ids of tokens: none is large
                    tensor = tensor.float()
                if tensor.dtype is torch.float64:
                    cell.copy_(torch.linalg.vector_norm(tensor, math.inf))
                else:
                    torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32, out=cell)
            if self._event is not None:
                self._here.copy_(self._there, non_blocking=True)
                self._event.record(self._module.current_stream(self._device))

    def read(self) -> Sizes:
        """Return the magnitudes; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return _classes(self._here[: self._count].tolist())


def _is_late(device: torch.device) -> bool:
    """Whether a device computes behind its host."""
    return device.type != "cpu"


def part_of(tensor: torch.Tensor, number: int, limit: int) -> torch.Tensor:
    """Return about `limit` numbers of a much larger tensor, without a copy: rows at a distance, others each time."""
    if tensor.numel() <= 2 * limit or tensor.dim() < 2:
        return tensor
    longest = max(range(tensor.dim() - 1), key=lambda place: tensor.shape[place])  # kernels mostly work by row
    step = min(tensor.shape[longest], tensor.numel() // limit)
    return tensor[(slice(None),) * longest + (slice(number % step, None, step),)]


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
