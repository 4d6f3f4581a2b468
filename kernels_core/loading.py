"""Sources become kernel layers: each is loaded once, and adapted once to each layer that needs it."""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from .contract import BOUND
from .errors import LoadError, ResolutionError
from .layer import Layer, source_label
from .plugins import plugin_manager
from .resolution import Candidate, KernelLayer, LayerRequest, LoadedLayer, Refusal
from .scope import PATIENCE
from .torch_internals import no_dispatch_modes, no_torch_function

_lock = threading.Lock()


@dataclass
class _Load:
    """The outcome of loading a source, or the lock that the thread holds which loads it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcome: LoadedLayer | Exception | None = None


_weak: weakref.WeakKeyDictionary[object, dict[str, _Load]] = weakref.WeakKeyDictionary()
"""Loads by type of device, of sources that are only equal to themselves: dropped with the scope that names them."""

_strong: dict[object, tuple[object, dict[str, _Load]]] = {}
"""Loads by type of device, of sources that are equal to others by value, with the source."""


def load(request: LayerRequest, candidate: Candidate) -> LoadedLayer | Refusal:
    """Turn the source of a candidate into a kernel layer for a request, or a refusal; this does I/O."""
    loaded = _outcome(request, candidate)
    if isinstance(loaded, LoadedLayer) and loaded.adapt is not None and request.layer is not None:
        loaded = _adapted(request.layer, loaded)
    if isinstance(loaded, LoadedLayer):
        return loaded
    return Refusal(_reason(loaded, candidate), candidate, candidate.plugin, loaded)


def _outcome(request: LayerRequest, candidate: Candidate) -> LoadedLayer | Exception:
    """Return the layer that a source was or is now turned into, or the exception that this raises."""
    source, hook = candidate.source, plugin_manager().hook
    fetched = not isinstance(source, type | types.FunctionType)  # of those, there is nothing to remember
    load = _find(source, request.device.type) if fetched else _Load()
    acquired = load.lock.acquire(timeout=PATIENCE)
    try:
        if load.outcome is None:
            try:
                # Leave modes such as that of `torch.export`: kernels may make real tensors when they are imported.
                with no_torch_function(), no_dispatch_modes():
                    made = hook.kernels_load_layer(request=request, source=source)
            except Exception as error:  # any fault of a kernel is a reason, never a crash of the model
                made = error
            if made is None:
                made = LoadError(
                    f"no plugin knows how to load a {type(source).__name__}: use a repository, an object with "
                    "load(), an nn.Module class or a function"
                )
            load.outcome = made if isinstance(made, LoadedLayer | Exception) else LoadedLayer(made, source_label(made))
            if fetched and isinstance(load.outcome, Exception):
                hook.kernels_kernel_failed(request=request, candidate=candidate, error=load.outcome)
                _strip(load.outcome)
        return load.outcome
    finally:
        if acquired:
            load.lock.release()


def _find(source: object, device: str) -> _Load:
    with _lock:
        if type(source).__eq__ is object.__eq__:  # only equal to itself
            with contextlib.suppress(TypeError):  # it does not allow weak references
                return _weak.setdefault(source, {}).setdefault(device, _Load())
        return _strong.setdefault(source_key(source), (source, {}))[1].setdefault(device, _Load())


def forget_loads() -> None:
    """Drop all loads: every source is loaded again when it is needed."""
    with _lock:
        _weak.clear()
        _strong.clear()


def forget_failures() -> None:
    """Let sources that failed be tried again."""
    with _lock:
        for loads in (*_weak.values(), *(loads for _, loads in _strong.values())):
            for device in [d for d, load in loads.items() if isinstance(load.outcome, Exception)]:
                del loads[device]


def _adapted(layer: Layer, loaded: LoadedLayer) -> LoadedLayer | Exception:
    """Adapt a kernel to a layer, once. The layer keeps the result: a table here would keep both alive."""
    known = layer.adapted.get(id(loaded))
    if known is None:
        try:
            with no_torch_function(), no_dispatch_modes():
                made = replace(loaded, layer=cast(Any, loaded.adapt)(layer), adapt=None)
        except Exception as error:  # any fault of a kernel is a reason, never a crash of the model
            return error
        known = layer.adapted.setdefault(id(loaded), (loaded, made))  # kept, so that its id is not given to another
    return cast(LoadedLayer, known[1])


def implementation_of(layer: Layer | None, kernel: KernelLayer) -> Callable[..., Any]:
    """Return the function that a call calls: of a class, its `forward`, which runs on the module that is served."""
    if not isinstance(kernel, type):
        return kernel
    forward: Callable[..., Any] = cast(Any, kernel).forward
    if layer is None or not layer.is_function:
        return forward
    # A function has no module: bind an empty one, kept on the class so that both are dropped together.
    with _lock:
        if BOUND not in vars(kernel):
            setattr(kernel, BOUND, types.MethodType(forward, kernel()))
    return cast(Callable[..., Any], getattr(kernel, BOUND))


def source_key(source: object) -> object:
    """Return a key for a source: equal values have equal keys."""
    try:
        hash(source)
    except TypeError:
        return (type(source), id(source))
    return (type(source), source)


def _reason(error: Exception, candidate: Candidate) -> str:
    if isinstance(error, ResolutionError):
        return str(error)
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    plugin = getattr(error, "kernels_plugin", candidate.plugin)
    return text if plugin == candidate.plugin else f"{text} (raised by plugin {plugin!r})"


def _strip(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that is remembered: their frames would keep the source alive."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
