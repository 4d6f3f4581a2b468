"""`Reader`: the largest magnitudes of tensors, computed by their device while the host goes on.

On an NVIDIA GPU with Triton, one kernel reads a tensor at the speed of its memory, and writes to memory of the host.
Elsewhere, an operator of PyTorch computes them, and they are copied.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import threading
import weakref
from collections.abc import Callable

import torch

from kernels_core import WarnOnce
from kernels_core.torch_internals import version

TENSORS = 16
"""Tensors of a call that are read."""

READ = 2**24
"""Numbers of a tensor that are read in each call, of more than twice as many: others each time."""

_ROWS = 256
"""Calls whose magnitudes may be on their way: those of earlier calls are waited for, and kept as numbers."""

_GROUP = 4
"""Tensors that the kernel reads at once."""

_REMEMBERED = 64

_UNKNOWN = -1
"""In place of the bits of a magnitude, which are never negative: the device has not written it yet."""

INFINITE, MINUS_INFINITE, NAN = 1, 2, 4
_SPECIAL = INFINITE | MINUS_INFINITE | NAN
"""Their bits are the last three of a magnitude in float32, as the kernel writes it."""

Size = tuple[float, int]
"""The largest finite magnitude in a tensor, and whether infinities and NaN are there."""

_warn_once = WarnOnce()


class Magnitudes:
    """The magnitudes of the tensors that one call read."""

    def __init__(self, row: _Row) -> None:
        self._row = row
        self._sizes: list[Size] | None = None

    def sizes(self, *, wait: bool = False) -> list[Size] | None:
        """Return them; None while the device has not computed them, unless this is to wait."""
        if self._sizes is None:
            sizes = self._row.read(wait)
            if self._sizes is None:  # else, another thread has read them, and the row may belong to a later call
                self._sizes = sizes
        return self._sizes


Place = tuple[Magnitudes, int]
"""Where the magnitude of a tensor will be found."""


class Reader:
    """Reads tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type not in ("cpu", "mps")
        with torch.inference_mode(False):
            partials = torch.zeros(_ROWS, -(-TENSORS // _GROUP), 8, dtype=torch.int32, device=device)
            there = torch.zeros(_ROWS, TENSORS, dtype=torch.float32, device=device)
            here = torch.zeros(_ROWS, TENSORS, dtype=torch.float32, device="cpu", pin_memory=pinned)
        self._rows = [_Row(*parts, pinned) for parts in zip(partials, there, here, strict=True)]
        if pinned:
            torch.get_device_module(device.type).synchronize(device)  # the zeros are there for each stream
        self._next = itertools.count()
        self._lock = threading.Lock()  # threads share a reader
        self._remembered: dict[int, tuple[weakref.ref[torch.Tensor], int, Place]] = {}
        self._kernel = _kernel_for(device)

    def start(self, tensors: list[torch.Tensor], number: int, whole: bool) -> list[Place]:
        """Start to read tensors, without waiting, and return where each will be found.

        One that an earlier call read, and that has not changed since, is not read again.

        Args:
            tensors: Not empty, of real numbers.
            number: Which part of a large tensor is read.
            whole: Whether large tensors are read as a whole.
        """
        places: list[Place | None] = []
        unread: list[torch.Tensor] = []
        for tensor in tensors:
            entry = self._remembered.get(id(tensor))
            same = entry is not None and entry[0]() is tensor and entry[1] == version(tensor)
            places.append(entry[2] if entry is not None and same else None)
            if not same:
                unread.append(tensor)
        if unread:
            with self._lock:  # one that was overtaken by as many calls as there are rows would share one
                row = self._rows[next(self._next) % _ROWS]
                magnitudes = row.lend(len(unread))
                self._read(row, unread, number, whole)
            for index, tensor in enumerate(unread):
                # Others may have been changed uncounted: parameters by fused optimizers, outputs by kernels. What
                # autograd has saved may not.
                if tensor.requires_grad and not tensor.is_leaf and (whole or _step(tensor) == 1):
                    if len(self._remembered) >= _REMEMBERED:
                        self._remembered.clear()
                    self._remembered[id(tensor)] = (weakref.ref(tensor), version(tensor), (magnitudes, index))
            numbers = itertools.count()
            return [(magnitudes, next(numbers)) if place is None else place for place in places]
        return [place for place in places if place is not None]

    def _read(self, row: _Row, tensors: list[torch.Tensor], number: int, whole: bool) -> None:
        if self._kernel is not None:
            try:
                row.launch(self._kernel, tensors, number, whole)
                return
            except Exception as error:  # such as no compiler for C on this machine
                self._kernel = None
                _warn_once(
                    f"Canary: PyTorch's operators read the inputs of kernels, which takes a GPU longer, for the kernel "
                    f"in Triton raised {type(error).__name__}: {error}",
                    "kernel",
                )
        row.compute(tensors, number, whole)


class _Row:
    """The magnitudes of one call, in memory of the device and of the host: which looks, and waits for no event."""

    def __init__(self, partials: torch.Tensor, there: torch.Tensor, here: torch.Tensor, pinned: bool) -> None:
        self._partials, self._cells = partials.unbind(), there.unbind()
        self._there, self._here, self._pinned = there, here, pinned
        self._address = here.data_ptr()
        self._bits = (ctypes.c_int32 * TENSORS).from_address(self._address)
        self._count = 0
        self._lent: Magnitudes | None = None

    def lend(self, count: int) -> Magnitudes:
        """Return the magnitudes of a new call, after those of the last call in this row were taken."""
        if self._lent is not None and self._lent.sizes() is None:
            self._lent.sizes(wait=True)
        self._lent = Magnitudes(self)
        self._count = count
        for index in range(count):
            self._bits[index] = _UNKNOWN
        return self._lent

    def launch(self, kernel: Callable[..., None], tensors: list[torch.Tensor], number: int, whole: bool) -> None:
        """Read tensors with the kernel, which writes to the host."""
        for start in range(0, len(tensors), _GROUP):
            some = tensors[start : start + _GROUP]
            steps = [1 if whole else _step(tensor) for tensor in some]
            kernel(some, steps, number, self._partials[start // _GROUP], self._address + 4 * start)

    def compute(self, tensors: list[torch.Tensor], number: int, whole: bool) -> None:
        """Read tensors with operators of PyTorch."""
        with torch.no_grad():  # `out` is not for autograd, and autocast makes no copies with it
            for tensor, cell in zip(tensors, self._cells, strict=False):
                part = tensor if whole else part_of(tensor, number, READ)
                is_integer = not part.dtype.is_floating_point
                if is_integer or part.dtype is torch.float64:
                    part = part.float()
                if is_integer:
                    torch.linalg.vector_norm(part, math.inf, dtype=torch.float32, out=cell)
                    cell.view(torch.int32).bitwise_and_(~_SPECIAL)
                    continue
                least, most = torch.aminmax(part)  # both are NaN if a number is: it hides infinities here
                finite = torch.nan_to_num(part, 0.0, 0.0, 0.0)
                torch.linalg.vector_norm(finite, math.inf, dtype=torch.float32, out=cell)
                special = (most == math.inf) * INFINITE | (least == -math.inf) * MINUS_INFINITE | most.isnan() * NAN
                cell.view(torch.int32).bitwise_and_(~_SPECIAL).bitwise_or_(special)
            if self._pinned:
                self._here.copy_(self._there, non_blocking=True)

    def read(self, wait: bool) -> list[Size] | None:
        """Return the magnitudes; None if they are not there, and are not to be waited for."""
        if not self._pinned:
            self._here.copy_(self._there)
        elif _UNKNOWN in self._bits[: self._count]:
            if not wait:
                return None
            device = self._there.device
            torch.get_device_module(device.type).synchronize(device)
        bits = self._bits[: self._count]
        sizes = struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}i", *[each & ~_SPECIAL for each in bits]))
        return [(size, each & _SPECIAL) for size, each in zip(sizes, bits, strict=True)]


def _kernel_for(device: torch.device) -> Callable[..., None] | None:
    """Return the kernel that reads tensors of a device; None where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        from ..packs.triton.largest import start_largest
    except ImportError:  # PyTorch for CUDA installs Triton, but not on each system
        return None
    return start_largest


def _step(tensor: torch.Tensor) -> int:
    count = tensor.numel()
    return count // READ if count > 2 * READ else 1


def part_of(tensor: torch.Tensor, number: int, limit: int) -> torch.Tensor:
    """Return about `limit` numbers of a much larger tensor, without a copy: rows at a distance, others each time."""
    if tensor.numel() <= 2 * limit or tensor.dim() < 2:
        return tensor
    longest = max(range(tensor.dim() - 1), key=lambda place: tensor.shape[place])  # kernels mostly work by row
    step = min(tensor.shape[longest], tensor.numel() // limit)
    return tensor[(slice(None),) * longest + (slice(number % step, None, step),)]
