"""Plugin `observe`: what `KERNELS_OBSERVE` switches on, and nothing else.

It is asked where decisions are made, never on a call; so while it is off, calls are what they are without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kernels_core import Candidate, KernelsError, LayerRequest, PluginError, Resolution, hookimpl, plugin_manager

from .counters import PrometheusCounters
from .log import LogResolutions
from .ranges import ProfileRanges
from .settings import observed

Forward = Callable[..., Any]
Observer = LogResolutions | ProfileRanges | PrometheusCounters

_KINDS: dict[str, Callable[[], Observer]] = {
    "log": LogResolutions,
    "ranges": ProfileRanges,
    "prometheus": PrometheusCounters,
}
_make = functools.cache(lambda name: _KINDS[name]())


def _observers() -> Iterator[Observer]:
    """Yield what is switched on; what cannot be is told once, and raised where warnings are not enough."""
    try:
        names = observed()
    except KernelsError as error:
        _report(error)
        return
    for name in names:
        try:
            yield _make(name)
        except KernelsError as error:
            _report(error)


def _report(error: KernelsError) -> None:
    fault = PluginError(str(error), plugin="observe")
    fault.__cause__ = error
    plugin_manager().report(fault)


@hookimpl
def kernels_resolved(resolution: Resolution) -> None:
    """Tell the observers what was decided."""
    for observer in _observers():
        if isinstance(observer, LogResolutions | PrometheusCounters):
            observer.kernels_resolved(resolution)


@hookimpl
def kernels_kernel_failed(request: LayerRequest, candidate: Candidate) -> None:
    """Tell the observers what failed."""
    for observer in _observers():
        if isinstance(observer, PrometheusCounters):
            observer.kernels_kernel_failed(request, candidate)


@hookimpl
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Forward], Forward] | None:
    """Let the observers put something around calls; nothing, if none is switched on."""
    wraps = [
        observer.kernels_wrap_forward(resolution)
        for observer in _observers()
        if isinstance(observer, ProfileRanges | PrometheusCounters)
    ]
    if not wraps:
        return None
    return lambda forward: functools.reduce(lambda inner, wrap: wrap(inner), wraps, forward)
