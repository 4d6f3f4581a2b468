"""Sources become kernel layers: each is loaded once, and adapted once to each layer that needs it."""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from .contract import BOUND
from .errors import LoadError, ResolutionError, UntrustedError
from .guards.parts import checks_parts
from .layer import Layer, source_label
from .mode import Mode
from .plugins import plugin_manager
from .resolution import Candidate, Cause, KernelLayer, LayerRequest, LoadedLayer, Refusal
from .scope import PATIENCE
from .torch_internals import no_dispatch_modes, no_torch_function

_lock = threading.Lock()


@dataclass
class _Load:
    """The outcome of loading a source, or the lock that the thread holds which loads it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcome: LoadedLayer | Exception | None = None
    parts: list[Candidate] = field(default_factory=list)
    """The code in it that policies were asked about by `authorize`: they are asked again for each decision."""
    vetoed: bool = False


_current: ContextVar[tuple[LayerRequest, _Load] | None] = ContextVar("kernels_core.loading", default=None)
"""The request and the load that this thread or task is in."""


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
    cause = Cause.POLICY if type(loaded) is UntrustedError else Cause.LOAD  # that of `authorize`, and no kind of it
    return Refusal(_reason(loaded, candidate), candidate, candidate.plugin, loaded, cause)


def _outcome(request: LayerRequest, candidate: Candidate) -> LoadedLayer | Exception:
    """Return the layer that a source was or is now turned into, or the exception that this raises."""
    source, hook = candidate.source, plugin_manager().hook
    fetched = not isinstance(source, type | types.FunctionType)  # of those, there is nothing to remember
    load = _find(source, request.device.type) if fetched else _Load()
    acquired = load.lock.acquire(timeout=PATIENCE)
    token = _current.set((request, load))
    try:
        if load.outcome is not None:
            _ask(request, load.parts)
        else:
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
            if fetched and isinstance(made, Exception):
                if not load.vetoed:
                    hook.kernels_kernel_failed(request=request, candidate=candidate, error=made)
                _strip(made)
            if load.vetoed:  # for this request: other requests load it anew
                outcome, load.outcome, load.vetoed, load.parts = load.outcome, None, False, []
                return outcome
        return load.outcome
    except UntrustedError as error:
        return error
    finally:
        _current.reset(token)
        if acquired:
            load.lock.release()


def authorize(source: object, plugin: str = "") -> None:
    """Ask the policies about code that a loader finds on its way: where a kernel was moved, what it depends on.

    For plugins that load kernels, before anything of that code is fetched or imported. `kernels_authorize` gets the
    request of the load and a candidate with this source; outside of a load, a request without a layer, whose
    `layer_name` is empty.

    Args:
        source: Identifies the code, such as a repository at a commit.
        plugin: The plugin that would load it.

    Raises:
        UntrustedError: If a policy refuses it, or a required plugin is missing; names the source and the reason.

    Example:
        >>> authorize("acme/silu at 0123abcd")
    """
    candidate = Candidate(source, plugin)
    current = _current.get()
    if current is None:
        _ask(LayerRequest("", torch.get_default_device(), Mode.FALLBACK), [candidate])
        return
    request, load = current
    load.parts.append(candidate)
    load.vetoed = True  # also where the error is caught, and another one is raised
    _ask(request, [candidate])
    load.vetoed = False


def _ask(request: LayerRequest, candidates: list[Candidate]) -> None:
    for candidate in candidates:
        if reasons := plugin_manager().vetoes(request, candidate):
            raise UntrustedError(f"{candidate.label}: {'; '.join(reasons)}", request=request)


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
    if layer is None:
        return forward
    if not layer.is_function:
        known = layer.adapted.get(id(kernel))
        if known is None:
            checked = checks_parts(layer, kernel)
            if checked is forward:
                return forward
            known = layer.adapted.setdefault(id(kernel), (kernel, checked))
        return cast(Callable[..., Any], known[1])
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
