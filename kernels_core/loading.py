"""Sources become kernel layers: each is loaded once, and adapted once to each layer that needs it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from .contract import BOUND
from .environment import strict
from .errors import LoadError, NoKernelError, ResolutionError, UntrustedError, is_transient
from .forward_source import own_signature
from .guards.limits import limited
from .guards.parts import checks_parts
from .guards.quarantine import find_denied
from .layer import Forward, Layer, source_label
from .mode import Mode
from .plugins import plugin_manager
from .raised import detached, error_text, message_of
from .resolution import Candidate, Cause, KernelLayer, LayerRequest, LoadedLayer, Refusal
from .scopes.frame import PATIENCE, forget, resolving
from .torch_internals import constant_result, no_dispatch_modes, no_torch_function
from .warning import warn_once

_lock = threading.Lock()


@dataclass
class _Load:
    """The outcome of loading a source, or the lock that the thread holds which loads it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcome: LoadedLayer | Exception | None = None
    parts: list[Candidate] = field(default_factory=list)
    """The code in it that policies were asked about by `authorize`: they are asked again for each decision."""
    vetoed: bool = False
    again: LayerRequest | None = None
    """The request to load the source again with, where it could not be reached; it holds no layer and no scope."""


_current: ContextVar[tuple[LayerRequest, _Load] | None] = ContextVar("kernels_core.loading", default=None)
"""The request and the load that this thread or task is in."""


_weak: weakref.WeakKeyDictionary[object, dict[str, _Load]] = weakref.WeakKeyDictionary()
"""Loads by type of device, of sources that are only equal to themselves: dropped with the scope that names them."""

_strong: dict[object, tuple[object, dict[str, _Load]]] = {}
"""Loads by type of device, of sources that are equal to others by value, with the source."""


def load(request: LayerRequest, candidate: Candidate) -> LoadedLayer | Refusal:
    """Turn the source of a candidate into a kernel layer for a request, or a refusal; this does I/O."""
    if isinstance(candidate.source, type | types.FunctionType):  # there is nothing to remember
        loaded = _made(request, candidate.source, _Load())
    else:
        loaded = _outcome(request, candidate)
    # The same load may serve several layers, each in its way.
    if isinstance(loaded, LoadedLayer) and loaded.adapt is not None and request.layer is not None:
        loaded = _adapted(request.layer, loaded)
    if isinstance(loaded, LoadedLayer):
        return loaded
    cause = Cause.POLICY if type(loaded) is UntrustedError else Cause.LOAD  # that of `authorize`, and no kind of it
    later = "; it is loaded again in the background" if is_transient(loaded) else ""
    return Refusal(reason_of(loaded, candidate) + later, candidate, candidate.plugin, loaded, cause)


def _outcome(request: LayerRequest, candidate: Candidate) -> LoadedLayer | Exception:
    """Return the layer that a source was or is now turned into, or the exception that this raises."""
    source = candidate.source
    load = _find(source, request.device.type)
    lock = load.lock  # in a child that is forked meanwhile, it has another one
    acquired = lock.acquire(timeout=PATIENCE)
    try:
        if (known := load.outcome) is not None:
            _ask(request, load.parts)
            return known
        made = _made(request, source, load)
        if isinstance(made, Exception):
            if not load.vetoed:
                plugin_manager().hook.kernels_kernel_failed(request=request, candidate=candidate, error=made)
            detached(made)  # or its frames would keep the source alive
        if load.vetoed:  # for this request: other requests load it anew
            load.vetoed, load.parts = False, []
            return made
        if is_transient(made):
            load.again = LayerRequest(request.layer_name, request.device, request.modes[0], None, request.capability)
        load.outcome = made
        if load.again is not None:
            _retry_later()
        return made
    except UntrustedError as error:
        return error
    finally:
        if acquired:
            lock.release()


def _made(request: LayerRequest, source: object, load: _Load) -> LoadedLayer | Exception:
    """Let plugins turn a source into a layer."""
    token = _current.set((request, load))
    try:
        # Leave modes such as that of `torch.export`: kernels may make real tensors when they are imported.
        with no_torch_function(), no_dispatch_modes():
            made = plugin_manager().hook.kernels_load_layer(request=request, source=source)
    except Exception as error:  # any fault of a kernel is a reason, never a crash of the model
        return error
    finally:
        _current.reset(token)
    if made is None:
        return LoadError(
            f"no plugin knows how to load a {type(source).__name__}: use a repository, an object with "
            "load(), an nn.Module class or a function"
        )
    return made if isinstance(made, LoadedLayer) else LoadedLayer(made, source_label(made))


# --- Sources that could not be reached -------------------------------------------------------------

RETRY_AFTER, RETRY_AT_MOST = 30.0, 600.0
"""Seconds until a source that could not be reached is loaded again: at first, and at most."""

_retrying: threading.Thread | None = None
"""The thread that does: calls never wait for a network that is down."""


def _retry_later() -> None:
    """Start the thread that loads sources again which could not be reached, unless it runs."""
    global _retrying
    with _lock:
        if _retrying is None or not _retrying.is_alive():
            _retrying = threading.Thread(target=_retry, daemon=True, name="kernels-core-retry")
            _retrying.start()


def _retry() -> None:
    """Load such sources until none is left; drop all decisions when one of them changes."""
    global _retrying
    resolving.set(True)  # in this thread: decorated layers that plugins call run on their reference
    pause = RETRY_AFTER
    while True:
        time.sleep(pause)
        pause = min(2 * pause, RETRY_AT_MOST)
        with _lock:
            waiting = [(source, load) for source, load in _all() if load.again is not None]
            if not waiting:
                _retrying = None
                return
        if any([_reached(source, load) for source, load in waiting]):
            forget()
        del waiting  # or the sources of scopes that are gone would live on


def _all() -> list[tuple[object, _Load]]:
    tables = (*_weak.items(), *_strong.values())
    return [(source, load) for source, loads in tables for load in loads.values()]


def _reached(source: object, load: _Load) -> bool:
    """Load a source again; return whether another outcome than an unreachable source is known now, or will be."""
    attempt = _Load()
    assert load.again is not None
    made = _made(load.again, source, attempt)
    if is_transient(made) and not attempt.vetoed:
        return False
    load.again = None
    if isinstance(made, LoadedLayer) and not attempt.vetoed:
        load.parts, load.outcome = attempt.parts, made
    else:  # the next call finds the reason for its own request, and reports it
        load.parts, load.outcome = [], None
    return True


def _in_child() -> None:
    """Start anew in a forked child: the threads that held locks, or were to try again, do not exist there."""
    global _lock
    _lock = threading.Lock()
    for _, load in _all():
        load.lock = threading.Lock()
    if any(load.again is not None for _, load in _all()):
        _retry_later()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)


def authorize(source: object, plugin: str = "") -> None:
    """Ask the policies about code that a loader finds on its way: the new place of a kernel, its dependencies.

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
        denied = find_denied(request, candidate)
        if reasons := [denied.reason] if denied is not None else plugin_manager().vetoes(request, candidate):
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
    forward: Forward = cast(Any, kernel).forward if isinstance(kernel, type) else kernel
    if layer is None:
        return forward
    known = layer.adapted.get(id(kernel))  # by id: a kernel need not have a hash
    if known is not None:
        return cast(Callable[..., Any], known[1])
    if not layer.is_function:
        checked = limited(kernel, checks_parts(layer, kernel))
    elif isinstance(kernel, type):  # a function has no module: bind an empty one, dropped together with the class
        with _lock:
            if BOUND not in vars(kernel):
                setattr(kernel, BOUND, types.MethodType(limited(kernel, forward), kernel()))
        checked = forward = getattr(kernel, BOUND)
    else:
        checked = limited(kernel, forward)
    if hasattr(layer.reference, "__wrapped__") or hasattr(layer.reference, "__signature__"):
        checked = _checks_arguments(layer, source_label(kernel), checked)
    return forward if checked is forward else layer.adapted.setdefault(id(kernel), (kernel, checked))[1]


def limited_implementation(layer: Layer | None, candidate: Candidate, loaded: LoadedLayer) -> Forward:
    """Return the same, within the limit of a candidate: one function for equal limits."""
    forward, limit = implementation_of(layer, loaded.layer), candidate.limit
    if limit is None or layer is None:
        return forward
    key = id(forward), limit
    if key not in layer.adapted:
        made = limit(loaded, forward)
        if made is not forward:
            functools.update_wrapper(made, forward)  # what guards ask a kernel for, it has, too
            made.__dict__["kernels_unlimited"] = forward
            if (joins := getattr(limit, "join", None)) is not None:
                made.__dict__["kernels_join"] = functools.partial(joins, forward)
        layer.adapted.setdefault(key, (forward, made))
    return cast(Forward, layer.adapted[key][1])


def _checks_arguments(layer: Layer, origin: str, forward: Forward) -> Forward:
    """Return a forward that leaves calls to the reference whose arguments a decorator of it may rename, drop or move.

    A kernel is called in place of the decorator. Its `**kwargs` would swallow a keyword that the decorator renames; and
    one without them would raise, and seem to be at fault.
    """
    shown = [p for p in layer.signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = own_signature(layer.reference).parameters.values()
    if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken):  # Python refuses such arguments
        return forward
    known = frozenset(p.name for p in shown if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in shown) + (not layer.is_function)
    most = sys.maxsize if any(p.kind is p.VAR_POSITIONAL for p in shown) else places
    reference, name, use_fallback = layer.reference, layer.name, layer.use_fallback

    @constant_result  # in compiled code, it speaks once, while that is traced
    def tell(argument: str) -> None:
        text = (
            f"{origin} does not serve layer {name!r} here, for a decorator of the layer's forward may rename, drop or "
            f"move {argument}, which the forward itself does not take."
        )
        if strict() or not use_fallback:
            raise NoKernelError(f"{text} Pass arguments that the forward names, or allow the reference.")
        warn_once(f"{text} The reference runs instead.", stacklevel=3)

    def misfit(*args: Any, **kwargs: Any) -> str:
        for keyword in kwargs:
            if keyword not in known:
                return f"the keyword {keyword!r}"
        return f"argument {len(args)}" if len(args) > most else ""

    @functools.wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if argument := misfit(*args, **kwargs):
            tell(argument)
            return reference(*args, **kwargs)
        return forward(*args, **kwargs)

    checked.__dict__["kernels_misfit"] = misfit
    return checked


def source_key(source: object) -> object:
    """Return a key for a source: equal values have equal keys."""
    try:
        hash(source)
    except TypeError:
        return (type(source), id(source))
    return (type(source), source)  # 1 == True == 1.0: equal, and sources of other kinds


def reason_of(error: Exception, candidate: Candidate) -> str:
    """Return the reason for a refusal: the error, and the plugin that raised it if another one offers."""
    if isinstance(error, ResolutionError):
        return message_of(error)
    text = error_text(error)
    plugin = getattr(error, "kernels_plugin", candidate.plugin)
    return text if plugin == candidate.plugin else f"{text} (raised by plugin {plugin!r})"
