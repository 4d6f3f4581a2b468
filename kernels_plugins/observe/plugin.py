"""Plugin `observe`: passes decisions and calls to the observers that `KERNELS_OBSERVE` switches on.

Its hooks run where decisions are made, never in a call: while no observer is on, calls are what they are without it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from kernels_core import (
    ArgumentError,
    Candidate,
    KernelsError,
    LayerRequest,
    PluginError,
    Resolution,
    hookimpl,
    plugin_manager,
    setting,
)

Forward = Callable[..., Any]

VARIABLE = "KERNELS_OBSERVE"
_OBSERVERS = {
    "log": (".log", "LogResolutions"),
    "ranges": (".ranges", "ProfileRanges"),
    "prometheus": (".counters", "PrometheusCounters"),
}
"""Module and class of each observer: they are imported when one is switched on."""


def observed() -> tuple[str, ...]:
    """Return the names of the observers that `KERNELS_OBSERVE` switches on, each once.

    Raises:
        ArgumentError: If it contains an unknown name.

    Example:
        >>> observed()
        ()
    """
    if setting(VARIABLE) is False:
        return ()
    text = os.environ[VARIABLE].strip()
    wanted = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    unknown = [word for word in wanted if word not in _OBSERVERS]
    if unknown:
        raise ArgumentError(
            f"{VARIABLE}={text!r}: there is no {', '.join(map(repr, unknown))}. Write any of {', '.join(_OBSERVERS)}, "
            "with commas between them, or unset it."
        )
    return tuple(name for name in _OBSERVERS if name in wanted)


@functools.cache
def _make(name: str) -> object:
    module, cls = _OBSERVERS[name]
    return getattr(importlib.import_module(module, __package__), cls)()


def _implementations(hook: str) -> Iterator[Callable[..., Any]]:
    """Yield each active observer's implementation of a hook; report an observer that cannot be switched on."""
    try:
        names = observed()
    except KernelsError as error:
        _report(error)
        return
    for name in names:
        try:
            observer = _make(name)
        except KernelsError as error:
            _report(error)
        else:
            if hasattr(observer, hook):
                yield getattr(observer, hook)


def _report(error: KernelsError) -> None:
    fault = PluginError(str(error), plugin="observe")
    fault.__cause__ = error
    plugin_manager().report(fault)


@hookimpl
def kernels_resolved(resolution: Resolution) -> None:
    """Pass a decision to the observers."""
    for observe in _implementations("kernels_resolved"):
        observe(resolution)


@hookimpl
def kernels_kernel_failed(request: LayerRequest, candidate: Candidate) -> None:
    """Pass a failure to the observers."""
    for observe in _implementations("kernels_kernel_failed"):
        observe(request, candidate)


@hookimpl
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Forward], Forward] | None:
    """Let the observers wrap a forward; return None if none does."""
    wraps = [observe(resolution) for observe in _implementations("kernels_wrap_forward")]
    if not wraps:
        return None
    return lambda forward: functools.reduce(lambda inner, wrap: wrap(inner), wraps, forward)
