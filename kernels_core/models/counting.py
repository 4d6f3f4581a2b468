"""Counts of eager calls, per module and origin, while `count_calls` is open."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..guards.parts import for_module
from ..hookspecs import hookimpl
from ..layer import Forward, Layer
from ..plugins import plugin_manager
from ..resolution import Resolution

_lock = threading.Lock()
_opening = threading.Lock()
_open = 0
_counts: weakref.WeakKeyDictionary[torch.nn.Module | Layer, Counter[str]] | None = None


@contextmanager
def count_calls() -> Iterator[None]:
    """Count the eager calls of decorated layers, in all threads, for the receipts that are made afterwards.

    Counts start at zero each time, and stay until the next. Calls in compiled code are not counted. While no
    block is open, calls cost nothing extra.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> model = torch.nn.Sequential(Identity())
        >>> with count_calls():
        ...     y = model(torch.ones(1))
        >>> dict(receipt(model, device="cpu").rows[0].calls)
        {'reference': 1}
    """
    global _open, _counts
    with _opening:  # until the plugin is registered, or a block that opens while the last one closes finds it taken
        if _open == 0:
            _counts = weakref.WeakKeyDictionary()
            plugin_manager().register(_Counter(), "counter")
        _open += 1
    try:
        yield
    finally:
        with _opening:
            _open -= 1
            if _open == 0:
                plugin_manager().unregister("counter")


def calls_of(counted: Sequence[torch.nn.Module | Layer]) -> list[Mapping[str, int] | None]:
    """Return the calls per origin of each module or decorated function of a model.

    None for all of them if none was counted: the model ran at another time, in compiled code, or not at all. None for
    classes of which a forward makes modules.
    """
    with _lock:
        known = [_counts.get(each) if _counts is not None else None for each in counted]
    if not any(known):
        return [None] * len(known)
    # The calls of a class are counted by module: of those that a forward makes, nothing is kept.
    of_classes = [isinstance(each, Layer) and not each.is_function for each in counted]
    return [None if of_class else dict(count or {}) for of_class, count in zip(of_classes, known, strict=True)]


class _Counter:
    """A plugin that wraps each forward to count its calls."""

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward] | None:
        layer = resolution.request.layer
        return functools.partial(_counting, layer, resolution) if layer is not None else None


def _counting(layer: Layer, resolution: Resolution, forward: Forward) -> Forward:
    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        who, output = layer if layer.is_function else args[0], None
        origin = (resolution if layer.is_function else for_module(resolution, args[0])).origin
        misfit = getattr(resolution.implementation, "kernels_misfit", None)  # the function around the kernel asks it
        if misfit is not None and misfit(*args, **kwargs):
            origin = "reference"
        try:
            output = forward(*args, **kwargs)
        finally:
            if output is not NotImplemented:  # another kernel serves that call, and counts it
                with _lock:
                    if _counts is not None:
                        _counts.setdefault(who, Counter())[origin] += 1  # also of a call that raised: it was made
        return output

    return counted
