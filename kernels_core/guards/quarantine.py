"""Kernels that proved wrong in this process, or are denied: excluded for the calls concerned, until released."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, cast

import torch

from ..device import as_torch_device
from ..environment import words
from ..errors import ArgumentTypeError, require_type
from ..layer import Forward, Layer, source_label
from ..mode import Mode
from ..resolution import Candidate, LayerRequest, Resolution
from ..settings import reader
from ..warning import warn
from .limits import first_dtype, unlimited


@dataclass(frozen=True, eq=False)
class Quarantined:
    """A kernel that must not serve a layer, or all kernels that a glob matches.

    Attributes:
        layer_name: The name that the layer was decorated with; empty for a glob.
        layer: Where the layer is defined; empty for a glob.
        kernel: The origin of the kernel, or the glob.
        device: The device on which it must not; None for all.
        mode: `Mode.TRAINING` if it still serves inference; None if it serves nothing.
        reason: Its fault.
        error: What it raised, if it did; its traceback shows the lines and holds no values.
        dtype: The dtype of the calls that it must not serve, that of their first tensor; None for all.
    """

    layer_name: str
    layer: str
    kernel: str
    device: torch.device | None
    mode: Mode | None
    reason: str
    error: BaseException | None = field(default=None, repr=False)
    dtype: torch.dtype | None = None
    _layer: weakref.ref[Layer] | None = field(default=None, repr=False)
    _implementation: weakref.ref[Forward] | None = field(default=None, repr=False)

    @property
    def is_waiting(self) -> bool:
        """Whether it is not yet applied: ranks that have agreed on the layer apply it at their next `agree`."""
        return self in _waiting and is_agreed(self._layer() if self._layer is not None else None)

    @property
    def key(self) -> tuple[str, ...]:
        """The text of everything but the reason: equal on ranks that exclude the same kernel for the same calls."""
        device = self.device.type if self.device is not None else ""  # ranks have devices of other numbers
        mode = str(self.mode.value) if self.mode is not None else ""
        return self.layer_name, self.layer, self.kernel, device, mode, str(self.dtype or "").removeprefix("torch.")

    def concerns(self, request: LayerRequest, implementation: Forward | None, names: Iterable[str] = ()) -> bool:
        """Whether this entry excludes an implementation for a request, if only for calls with a dtype.

        Args:
            request: The request.
            implementation: The function that would be called; None while it is not loaded.
            names: What a glob is compared with, besides the layer name: origin, plugin.
        """
        if self.is_waiting:
            return False
        if self._implementation is None or self._layer is None:
            if not any(fnmatchcase(name, self.kernel) for name in (request.layer_name, *names)):
                return False
        elif (
            implementation is None
            or self._implementation() is not unlimited(implementation)
            or request.layer is None
            or self._layer() is not request.layer
        ):
            return False
        # The mode of the request is read last: reading it limits the decision to one mode.
        return self.device in (None, request.device) and (self.mode is None or self.mode in request.mode)

    @property
    def is_alive(self) -> bool:
        """Whether the kernel and the layer still exist."""
        return all(reference is None or reference() is not None for reference in (self._layer, self._implementation))

    def __str__(self) -> str:
        """Name kernel, layer and reason."""
        which = f" for layer {self.layer_name!r}" if self.layer_name else ""
        where = f" on {self.device}" if self.device is not None else ""
        when = f" for {str(self.mode.name).lower()}" if self.mode is not None else ""
        dtype = f" for {self.dtype}" if self.dtype is not None else ""
        return f"{self.kernel}{which}{where}{when}{dtype}: {self.reason}"


_DENY = ("KERNELS_DENY", "deny")
"""The variable, and the setting of the configuration file, with globs of kernels that must not serve."""
_lock = threading.Lock()
_entries: list[Quarantined] = []
_waiting: set[Quarantined] = set()
"""Those entries that are applied at the next `agree`."""
agreed: weakref.WeakSet[Layer] = weakref.WeakSet()
"""The layers that the ranks of a process group have agreed on: none of them leaves a kernel without the others."""
on_change: list[Callable[[], None]] = []
"""Called after the list has changed: the resolver drops its decisions then."""


def quarantine(
    layer: Layer | str,
    implementation: Forward | None = None,
    *,
    reason: str,
    kernel: str = "",
    device: str | torch.device | None = None,
    mode: Mode | None = None,
    dtype: torch.dtype | None = None,
    error: BaseException | None = None,
    now: bool = False,
) -> Quarantined:
    """Exclude a kernel from serving a layer, from the next call on; or all kernels that a glob matches.

    Where ranks have agreed on the layer (`agree`), it goes on until their next `agree`, which excludes it on all ranks.

    Args:
        layer: The layer that it must not serve any more; or a glob such as `"acme/*"`, which is compared with the
            origin of each kernel, with the plugin that offers it, and with the layer name.
        implementation: The function that must not be called, as in `Resolution.implementation`; none with a glob.
        reason: Its fault, and what to do about it.
        kernel: Its origin, as in `Resolution.origin`.
        device: The device for which that holds; None for all.
        mode: `Mode.TRAINING` to let it serve inference; None for all.
        dtype: The dtype of the calls for which that holds, that of their first tensor; None for all.
        error: What it raised.
        now: Whether to exclude it at once on this rank, before the others: where its calls cannot be answered
            otherwise until then.

    Returns:
        The entry, for `release`.

    Raises:
        ArgumentTypeError: If `layer` is neither a layer nor a glob, or `implementation` is a class or cannot be called,
            or `dtype` is none.

    Example:
        >>> layer = decorated_layer(use_kernel_forward_from_hub("f")(lambda x: x))
        >>> entries = [quarantine(layer, abs, kernel="abs", reason="it is wrong for complex numbers")]
        >>> entries.append(quarantine("acme/*", reason="we do not use kernels of acme"))
        >>> entries == quarantined()
        True
        >>> release(entries)
        2
    """
    is_glob = isinstance(layer, str) and bool(layer) and implementation is None
    if not isinstance(layer, Layer) and not is_glob:
        raise ArgumentTypeError(
            f"quarantine takes a layer, not {layer!r}: decorated_layer(...) returns it. A glob such as 'acme/*' stands "
            "by itself, without a function."
        )
    if not is_glob and (isinstance(implementation, type) or not callable(implementation)):
        raise ArgumentTypeError(
            f"quarantine takes the function that is called, not {implementation!r}: resolve(...).implementation, or "
            "the forward of a class."
        )
    require_type(dtype, (torch.dtype, NoneType), "dtype")
    require_type(now, bool, "now")
    require_type(kernel, str, "kernel")
    where = as_torch_device(device) if device is not None else None
    if is_glob:
        entry = Quarantined("", "", str(layer), where, mode, reason, error, dtype)
    else:
        # Weak: an entry must not keep a layer, or the code of a kernel, that nothing else uses.
        known, kept = weakref.ref(cast(Layer, layer)), weakref.ref(unlimited(cast(Forward, implementation)))
        name, place = cast(Layer, layer).name, cast(Layer, layer).qualname
        kernel = kernel or source_label(implementation)
        entry = Quarantined(name, place, kernel, where, mode, reason, error, dtype, known, kept)
    waits = not now and is_agreed(None if is_glob else cast(Layer, layer))
    with _lock:
        if waits:  # each call that fails comes here until then
            for other in _waiting:
                if other.key == entry.key and (is_glob or other._implementation == entry._implementation):
                    return other
            _waiting.add(entry)
        _entries.append(entry)
    if waits:
        warn(
            f"On this rank, {entry}. The ranks have agreed on this kernel, so it is not left by one of them: the next "
            "kernels_core.agree(...) takes it out on all ranks. Until then, the reference answers calls that fail."
        )
    else:
        _changed()
    return entry


def is_agreed(layer: Layer | None) -> bool:
    """Whether ranks of a process group that exists have agreed on a layer; on any, for None."""
    if not agreed or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return layer is None or layer in agreed


def apply(entries: Iterable[Quarantined]) -> None:
    """Apply the entries among these that have waited for that."""
    with _lock:
        waited = _waiting.intersection(entries)
        _waiting.difference_update(waited)
    if waited:
        _changed()


def quarantined() -> list[Quarantined]:
    """Return the kernels in quarantine in this process, oldest first.

    Example:
        >>> quarantined()
        []
    """
    with _lock:
        _entries[:] = [entry for entry in _entries if entry.is_alive]
        _waiting.intersection_update(_entries)
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
        _waiting.difference_update(released)
    if released:
        _changed()
    return len(released)


def _changed() -> None:
    for listener in on_change:
        listener()


def find_quarantined(request: LayerRequest, implementation: Forward | None, *names: str) -> Quarantined | None:
    """Return the entry, or the glob that the user denies, that excludes an implementation for calls of all dtypes.

    The arguments are those of `Quarantined.concerns`.
    """
    if not _entries and reader.known.nothing and _DENY[0] not in os.environ:  # the most frequent case: no further call
        return None
    # A coroutine or generator cannot pass calls of one dtype on.
    whole = (
        entry for entry in tuple(_entries) if entry.dtype is None or (request.layer is not None and request.layer.kind)
    )
    entries = (*whole, *_denied(*words(*_DENY)))  # the variable may change while the program runs
    return next((entry for entry in entries if entry.concerns(request, implementation, names)), None)


def excluded_dtypes(resolution: Resolution) -> dict[torch.dtype, Quarantined]:
    """Return the dtypes of calls that the kernel of a decision must not serve, with the entry for each."""
    if not _entries or resolution.implementation is None:
        return {}
    about = (resolution.request, resolution.implementation, names_of(resolution))
    # A copy of the list, which other threads change.
    return {entry.dtype: entry for entry in tuple(_entries) if entry.dtype is not None and entry.concerns(*about)}


def without_dtypes(resolution: Resolution, forward: Forward) -> Forward:
    """Return a forward that passes on the calls with such a dtype; `forward` itself if there is none."""
    dtypes, layer = frozenset(excluded_dtypes(resolution)), resolution.request.layer
    if not dtypes or layer is None or layer.kind:
        return forward

    @functools.wraps(forward)
    def excluding(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if first_dtype((*args, *kwargs.values())) in dtypes else forward(*args, **kwargs)

    if forward is not resolution.implementation:
        return excluding
    # The same function each time: code is not compiled again where a decision is the same.
    return cast(Forward, layer.adapted.setdefault((id(forward), dtypes), (forward, excluding))[1])


def find_denied(request: LayerRequest, candidate: Candidate) -> Quarantined | None:
    """Return the glob that excludes a candidate before anything of it is fetched: by the names of its source."""
    if not _entries and reader.known.nothing and _DENY[0] not in os.environ:
        return None
    return find_quarantined(request, None, *_names(candidate))


def names_of(resolution: Resolution) -> tuple[str, ...]:
    """Return the names of the kernel of a decision that a glob is compared with, besides the layer name."""
    more = _names(resolution.candidate) if resolution.candidate is not None else ()
    return (resolution.origin, resolution.plugin, *more)


def _names(candidate: Candidate) -> tuple[str, ...]:
    """Return plugin, source, repository, and the source without its layer: `pack:liger`, `python:acme.layers`."""
    source, label = candidate.source, candidate.label
    named = source if isinstance(source, str) else str(getattr(source, "repo_id", ""))
    return candidate.plugin, label, named, label.rpartition(":")[0]


@functools.lru_cache(maxsize=8)
def _denied(globs: tuple[str, ...], place: str) -> tuple[Quarantined, ...]:
    """Return an entry for each glob of `KERNELS_DENY`, or of the setting `deny`; it cannot be released."""
    return tuple(Quarantined("", "", glob, None, None, f"{place} has {glob!r}") for glob in globs)
