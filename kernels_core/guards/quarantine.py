"""Kernels that proved wrong in this process: excluded for the layers and devices concerned, until released."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..device import as_torch_device
from ..errors import ArgumentTypeError
from ..layer import Forward, Layer
from ..mode import Mode
from ..resolution import LayerRequest


@dataclass(frozen=True, eq=False)
class Quarantined:
    """A kernel that must not serve a layer.

    Attributes:
        layer_name: The name that the layer was decorated with.
        layer: Where the layer is defined.
        kernel: The origin of the kernel.
        device: The device on which it must not; None for all.
        mode: `Mode.TRAINING` if it still serves inference; None if it serves nothing.
        reason: Its fault.
        error: What it raised, if it did; its traceback shows the lines and holds no values.
    """

    layer_name: str
    layer: str
    kernel: str
    device: torch.device | None
    mode: Mode | None
    reason: str
    _layer: weakref.ref[Layer] = field(repr=False)
    _implementation: weakref.ref[Forward] = field(repr=False)
    error: BaseException | None = field(default=None, repr=False)

    def concerns(self, request: LayerRequest, implementation: Forward) -> bool:
        """Whether this entry excludes an implementation for a request."""
        return (
            self._implementation() is implementation
            and request.layer is not None
            and self._layer() is request.layer
            and self.device in (None, request.device)
            and (self.mode is None or self.mode in request.mode)
        )

    @property
    def is_alive(self) -> bool:
        """Whether the kernel and the layer still exist."""
        return self._implementation() is not None and self._layer() is not None

    def __str__(self) -> str:
        """Name kernel, layer and reason."""
        where = f" on {self.device}" if self.device is not None else ""
        when = f" for {str(self.mode.name).lower()}" if self.mode is not None else ""
        return f"{self.kernel} for layer {self.layer_name!r}{where}{when}: {self.reason}"


_lock = threading.Lock()
_entries: list[Quarantined] = []
on_change: list[Callable[[], None]] = []
"""Called after the list has changed: the resolver drops its decisions then."""


def quarantine(
    layer: Layer,
    implementation: Forward,
    *,
    kernel: str,
    reason: str,
    device: str | torch.device | None = None,
    mode: Mode | None = None,
    error: BaseException | None = None,
) -> Quarantined:
    """Exclude a kernel from serving a layer, from the next call on.

    Args:
        layer: The layer that it must not serve any more.
        implementation: The function that must not be called, as in `Resolution.implementation`.
        kernel: Its origin, as in `Resolution.origin`.
        reason: Its fault, and what to do about it.
        device: The device for which that holds; None for all.
        mode: `Mode.TRAINING` to let it serve inference; None for all.
        error: What it raised.

    Returns:
        The entry, for `release`.

    Raises:
        ArgumentTypeError: If `layer` is no layer, or `implementation` is a class or cannot be called.

    Example:
        >>> layer = decorated_layer(use_kernel_forward_from_hub("f")(lambda x: x))
        >>> entry = quarantine(layer, abs, kernel="abs", reason="it is wrong for complex numbers")
        >>> entry in quarantined()
        True
        >>> release(entry)
        1
    """
    if not isinstance(layer, Layer):
        raise ArgumentTypeError(f"quarantine takes a layer, not {layer!r}: decorated_layer(...) returns it.")
    if isinstance(implementation, type) or not callable(implementation):
        raise ArgumentTypeError(
            f"quarantine takes the function that is called, not {implementation!r}: resolve(...).implementation, or "
            "the forward of a class."
        )
    where = as_torch_device(device) if device is not None else None
    entry = Quarantined(
        layer.name, layer.qualname, kernel, where, mode, reason, weakref.ref(layer), weakref.ref(implementation), error
    )
    with _lock:
        _entries.append(entry)
    _changed()
    return entry


def quarantined() -> list[Quarantined]:
    """Return the kernels in quarantine in this process, oldest first.

    Example:
        >>> quarantined()
        []
    """
    with _lock:
        _entries[:] = [entry for entry in _entries if entry.is_alive]
        return list(_entries)


def release(entries: Quarantined | Iterable[Quarantined] | None = None) -> int:
    """Let kernels serve again, from the next call on.

    Args:
        entries: Entries that `quarantined` returned; None for all.

    Returns:
        How many were released.

    Raises:
        ArgumentTypeError: If they are no entries.

    Example:
        >>> release()
        0
    """
    given = [entries] if isinstance(entries, Quarantined) else entries
    wanted = list(given) if isinstance(given, Iterable) else given
    if wanted is not None and not (isinstance(wanted, list) and all(isinstance(it, Quarantined) for it in wanted)):
        raise ArgumentTypeError(f"release takes entries that quarantined() returned, not {entries!r}.")
    with _lock:  # `in` finds an entry by identity: entries are equal only to themselves
        released = [entry for entry in _entries if wanted is None or entry in wanted]
        _entries[:] = [entry for entry in _entries if entry not in released]
    if released:
        _changed()
    return len(released)


def _changed() -> None:
    for listener in on_change:
        listener()


def find_quarantined(request: LayerRequest, implementation: Forward) -> Quarantined | None:
    """Return the entry that excludes an implementation for a request, None if there is none."""
    return next((entry for entry in _entries if entry.concerns(request, implementation)), None)
