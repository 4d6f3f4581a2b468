"""Plugin `observe`: passes decisions and calls to the observers that are switched on.

Its hooks run where decisions are made, never in a call: while no observer is on, calls are what they are without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kernels_core import (
    ArgumentError,
    Candidate,
    ConfigSection,
    KernelsError,
    LayerRequest,
    PluginError,
    Resolution,
    configured,
    hookimpl,
    plugin_manager,
    setting,
)

Forward = Callable[..., Any]

VARIABLE = "KERNELS_OBSERVE"
_OBSERVERS = {"log": "LogResolutions", "ranges": "ProfileRanges", "prometheus": "PrometheusCounters"}
"""The class of each observer."""


def observed() -> tuple[str, ...]:
    """Return the names of the observers that `KERNELS_OBSERVE`, or the setting, switches on; refuse an unknown name.

    Example:
        >>> observed()
        ()
    """
    if VARIABLE not in os.environ:
        return configured("observers") or ()
    if setting(VARIABLE) is False:
        return ()
    text = os.environ[VARIABLE].strip()
    wanted = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    if unknown := [word for word in wanted if word not in _OBSERVERS]:
        raise ArgumentError(
            f"{VARIABLE}={text!r}: there is no {', '.join(map(repr, unknown))}. Write any of {', '.join(_OBSERVERS)}, "
            "with commas between them, or unset it."
        )
    return tuple(name for name in _OBSERVERS if name in wanted)


@functools.cache
def _make(name: str) -> object:
    from . import observers  # imported when one is switched on

    return getattr(observers, _OBSERVERS[name])()


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Report an error of ours: whoever misspells an observer has a model that runs without it."""
    try:
        yield
    except KernelsError as error:
        fault = PluginError(str(error), plugin="observe")
        fault.__cause__ = error
        plugin_manager().report(fault)


def _implementations(hook: str) -> list[Callable[..., Any]]:
    """Return each active observer's implementation of a hook."""
    if not os.environ.get(VARIABLE, configured("observers")):  # nearly always: two decisions of three ask nothing else
        return []
    names: tuple[str, ...] = ()
    observers = []
    with _reported():
        names = observed()
    for name in names:
        with _reported():
            observers.append(_make(name))
    return [getattr(observer, hook) for observer in observers if hasattr(observer, hook)]


def _parse(section: ConfigSection) -> tuple[str, ...]:
    """Parse `observers` of a configuration file."""
    for item in section.as_list():
        if item.as_text() not in _OBSERVERS:
            raise item.error(f"there is no such observer: write any of {', '.join(_OBSERVERS)}.")
    return tuple(name for name in _OBSERVERS if name in section.as_texts())


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `observers` in the configuration file."""
    return {"observers": _parse}


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
