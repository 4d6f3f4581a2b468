"""The cold path: ask plugins, rank, authorize, load, check; answer with reasons.

Nothing here runs on a warm call. While a thread resolves, decorated layers that plugins call run on
their reference, so that nothing recurses and no two resolutions wait for each other.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from . import scope
from .contract import BOUND, check_contract, check_mode
from .device import Device, as_torch_device, device_capability
from .environment import mapping_disabled, strict
from .errors import (
    ContractError,
    KernelsWarning,
    LoadError,
    NoKernelError,
    ResolutionError,
    UntrustedError,
)
from .guards.quarantine import Quarantined, find_quarantined, on_change
from .hookspecs import hookimpl
from .layer import Layer, decorated_layer, source_label
from .mode import Mode, check_call_mode
from .plugins import plugin_manager
from .resolution import (
    TIERS,
    Candidate,
    Cause,
    KernelLayer,
    LayerRequest,
    LoadedLayer,
    Refusal,
    Resolution,
)
from .scope import Frame
from .torch_internals import no_dispatch_modes, no_torch_function

_said: set[str] = set()
_saying = threading.RLock()


def resolve(
    layer_or_name: str | Layer | torch.nn.Module | type[torch.nn.Module] | Callable[..., Any],
    *,
    device: torch.device | Device | str,
    mode: Mode,
    candidate: Candidate | None = None,
) -> Resolution:
    """Decide what would serve a layer here and now, without running it.

    May download and import kernels, as the first call would.

    Args:
        layer_or_name: A layer name, a `Layer`, or something decorated: module, class or function.
        device: Device of the call, such as `"cuda:1"`; without an index, the current device.
        mode: `Mode.INFERENCE` or `Mode.TRAINING`, alone or with `Mode.TORCH_COMPILE`.
        candidate: The only candidate to try, in place of those that plugins offer.

    Returns:
        The decision, with every refusal. It never raises for want of a kernel.

    Raises:
        ArgumentError: If device or mode cannot be those of a call.
        ArgumentTypeError: If the first argument is not decorated.

    Example:
        >>> resolve("no such layer", device="cpu", mode=Mode.INFERENCE).origin
        'reference'
    """
    request = _public_request(layer_or_name, device, mode)
    if scope.resolving.get():  # a plugin asks while it is asked
        return Resolution(request, note="asked while a layer is being resolved")
    with _alone():
        if candidate is None or mapping_disabled():
            return _ask(request)
        outcome = _consider(request, candidate)
        return outcome if isinstance(outcome, Resolution) else Resolution(request, refusals=(outcome,))


def find_candidates(
    layer_or_name: str | Layer | torch.nn.Module | type[torch.nn.Module] | Callable[..., Any],
    *,
    device: torch.device | Device | str,
    mode: Mode,
) -> tuple[list[Candidate], list[Refusal]]:
    """Return every candidate for calls of a layer, best first, and nothing loaded.

    Args:
        layer_or_name: As for `resolve`, as are the others.
        device: See there.
        mode: See there.

    Returns:
        The candidates, and the refusals of kernels that are offered for other devices or modes, and of plugins
        that failed.

    Raises:
        ArgumentError: If device or mode cannot be those of a call.
        ArgumentTypeError: If the first argument is not decorated.

    Example:
        >>> find_candidates("no such layer", device="cpu", mode=Mode.INFERENCE)
        ([], [])
    """
    request = _public_request(layer_or_name, device, mode)
    if mapping_disabled():
        return [], []
    with _alone():
        candidates, failures, misfits = _ranked(request)
    return candidates, failures + misfits


def _public_request(layer_or_name: Any, device: torch.device | Device | str, mode: Mode) -> LayerRequest:
    layer = layer_or_name if isinstance(layer_or_name, Layer) else None
    if layer is None and not isinstance(layer_or_name, str):
        layer = decorated_layer(layer_or_name)
    where = as_torch_device(device)
    return LayerRequest(
        layer_name=layer.name if layer else str(layer_or_name),
        device=where,
        mode=check_call_mode(mode),
        layer=layer,
        capability=device_capability(where),
        scopes=scope.root.active.payloads(),
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Mark this thread or task as resolving, under the modes in which modules expect to be imported."""
    token = scope.resolving.set(True)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        scope.resolving.reset(token)


# --- For the dispatcher --------------------------------------------------------------------------


def ready() -> int:
    """Find the plugins, if that was not done yet, and return the generation that a decision now belongs to."""
    if not mapping_disabled():
        plugin_manager().plugins()
    return scope.generation()


def settle(layer: Layer, device: torch.device, frame: Frame, modes: tuple[Mode, ...]) -> Resolution | None:
    """Return the one decision for all of some modes, or None if the mode makes a difference.

    Kernels are loaded only if all modes would try the same ones, so that a training run does not
    fetch what is registered for inference.
    """
    requests = [_request(layer, device, frame, mode) for mode in modes]
    with _alone():
        if not mapping_disabled() and _pinned(requests[0]) is None:
            offers = [[(_identity(c.source), c.tier, c.plugin) for c in _ranked(request)[0]] for request in requests]
            if any(offer != offers[0] for offer in offers):
                return None
        first, *others = [_ask(request) for request in requests]
        if any(other.implementation is not first.implementation for other in others):
            return None
        first = replace(first, every_mode=True)
        _announce(first)
    return first


def decide(layer: Layer, device: torch.device, frame: Frame, mode: Mode) -> Resolution:
    """Return the decision for calls of one mode."""
    with _alone():
        resolution = _ask(_request(layer, device, frame, mode))
        _announce(resolution)
    return resolution


def must_raise(resolution: Resolution) -> bool:
    """Whether a call must fail rather than run the reference."""
    layer = resolution.request.layer
    if not resolution.is_reference or layer is None or resolution.note:
        return False
    return not layer.use_fallback or (strict() and bool(resolution.refusals))


def no_kernel(resolution: Resolution) -> NoKernelError:
    """Make the error that says why no kernel serves."""
    lines = [f"  refused {refusal}" for refusal in resolution.refusals]
    lines += [f"  not for this call: {misfit}" for misfit in resolution.misfits]
    why = "\n".join(lines) or "  no candidate was offered"
    rule = "KERNELS_STRICT is on" if strict() else "the layer was decorated with use_fallback=False"
    return NoKernelError(
        f"No kernel serves {resolution.subject}, and {rule}:\n{why}\n"
        "Register a kernel that fits with register_kernel_mapping, or allow the reference.",
        request=resolution.request,
        refusals=resolution.refusals,
    )


def serving_forward(resolution: Resolution) -> Callable[..., Any]:
    """Return the forward that serves calls by a decision: that of the kernel, else the reference.

    Raises:
        NoKernelError: If the reference must not serve.

    Example:
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x):
        ...     return x + x
        >>> serving_forward(resolve(double, device="cpu", mode=Mode.INFERENCE))(2)
        4
    """
    if must_raise(resolution):
        raise no_kernel(resolution)
    assert resolution.request.layer is not None
    return resolution.implementation or resolution.request.layer.reference


def _request(layer: Layer, device: torch.device, frame: Frame, mode: Mode) -> LayerRequest:
    return LayerRequest(
        layer_name=layer.name,
        device=device,
        mode=mode,
        layer=layer,
        capability=device_capability(device),
        scopes=frame.payloads(),
    )


def _ask(request: LayerRequest) -> Resolution:
    if mapping_disabled():
        return Resolution(request, note="DISABLE_KERNEL_MAPPING is on")
    pinned = _pinned(request)
    if pinned is not None:
        return pinned
    resolution = plugin_manager().resolve_forward(request) or Resolution(request)
    if resolution.implementation is None:
        return resolution
    entry = find_quarantined(request, resolution.implementation)
    if entry is None:
        return resolution
    # A plugin that answers by itself insists on a kernel that is out.
    refusal = _out(entry, resolution.candidate or Candidate(resolution.implementation))
    return Resolution(request, refusals=(*resolution.refusals, refusal), misfits=resolution.misfits)


def _out(entry: Quarantined, candidate: Candidate) -> Refusal:
    cause = Cause.LOAD if entry.mode is None else Cause.MODE
    return Refusal(f"it is in quarantine: {entry.reason}", candidate, candidate.plugin, cause=cause)


def peek(layer: Layer, device: torch.device, mode: Mode) -> Resolution:
    """Return the decision for calls of one mode, and tell nobody."""
    with _alone():
        return _ask(_request(layer, device, scope.root.active, mode))


@dataclass(frozen=True, eq=False)
class Pins:
    """The payload of a scope in which some layers were decided beforehand, whatever mappings say.

    Attributes:
        choices: The decision per layer.
    """

    choices: Mapping[Layer, Resolution]

    def decision(self, request: LayerRequest) -> Resolution | None:
        """Return the decision for a request, unless it is for another device or its kernel is in quarantine."""
        choice = self.choices.get(request.layer) if request.layer else None
        if choice is None or choice.request.device != request.device:
            return None
        if choice.implementation is None or find_quarantined(request, choice.implementation) is None:
            return replace(choice, request=request)
        return None


@dataclass(frozen=True)
class References:
    """The payload of a scope in which layers run on their references.

    Attributes:
        layers: The numbers of these layers; None for all.
    """

    layers: frozenset[int] | None = None

    def decision(self, request: LayerRequest) -> Resolution | None:
        """Return the decision for the reference, None for other layers."""
        if self.layers is None or (request.layer is not None and request.layer.number in self.layers):
            return Resolution(request, note="references() is open")
        return None


def _pinned(request: LayerRequest) -> Resolution | None:
    """Return the decision that was made beforehand, by the innermost scope that has one."""
    payloads = (payload for payload in request.scopes if isinstance(payload, Pins | References))
    return next(filter(None, (payload.decision(request) for payload in payloads)), None)


def choose(layer: Layer, device: torch.device, mode: Mode) -> Resolution:
    """Return the decision for a model that is being frozen; tells plugins, and leaves the rest to the caller."""
    ready()
    with _alone():
        resolution = _ask(_request(layer, device, scope.root.active, mode))
        plugin_manager().resolved(resolution)
    return resolution


def _announce(resolution: Resolution) -> None:
    """Tell plugins and, once for each reason, the user."""
    plugin_manager().resolved(resolution)
    for refusal in resolution.refusals:
        if refusal.candidate is None or must_raise(resolution):  # the plugin's fault and reported, or about to raise
            continue
        _warn_once(
            f"{resolution.request.layer_name}: {refusal}",
            f"A kernel for {resolution.subject} is not used, {resolution.origin} runs instead: {refusal}",
        )


def _warn_once(key: str, message: str) -> None:
    """Warn, unless that was done; where warnings are errors, each attempt raises."""
    with _saying:
        if key in _said:
            return
        warnings.warn(message, KernelsWarning, stacklevel=2)
        _said.add(key)


# --- The core's own answer -----------------------------------------------------------------------


class CorePlugin:
    """Answers `kernels_resolve_forward`, after everybody else had the chance."""

    @hookimpl(trylast=True)
    def kernels_resolve_forward(self, request: LayerRequest) -> Resolution:
        """Try the candidates in order; the first that nothing speaks against serves."""
        candidates, refused, misfits = _ranked(request)
        refusals = list(refused)
        for candidate in candidates:
            outcome = _consider(request, candidate)
            if isinstance(outcome, Resolution):
                return replace(outcome, refusals=tuple(refusals), misfits=tuple(misfits))
            refusals.append(outcome)
        return Resolution(request, refusals=tuple(refusals), misfits=tuple(misfits))


def _ranked(request: LayerRequest) -> tuple[list[Candidate], list[Refusal], list[Refusal]]:
    """Return the candidates, first to be tried first, the plugins that failed to offer any, and what does not fit."""
    candidates, refusals, misfits = plugin_manager().find_candidates(request)
    candidates.sort(key=lambda c: (TIERS.index(c.tier), -c.priority, c.plugin if c.tier == "plugin" else ""))
    best = candidates[0] if candidates else None
    offers = {c.plugin for c in candidates if best and c.tier == best.tier == "plugin" and c.priority == best.priority}
    if len(offers) > 1:
        first, *others = sorted(offers)
        message = (
            f"Plugins {', '.join(sorted(offers))} offer kernels for layer {request.layer_name!r} with equal "
            f"priority: {first!r} goes first, by name. Give one of them a larger kernels_priority, block one "
            f"with KERNELS_PLUGINS=-{others[0]}, or register the one that you want."
        )
        _warn_once(message, message)
    return candidates, refusals, misfits


def _consider(request: LayerRequest, candidate: Candidate) -> Resolution | Refusal:
    reasons = plugin_manager().authorize(request, candidate)
    if reasons:
        return _refusal(UntrustedError, request, candidate, reasons)
    loaded = _adapted(request.layer, _loads.load(request, candidate))
    if isinstance(loaded, Exception):
        return Refusal(_reason(loaded, candidate), candidate, candidate.plugin, loaded)
    reason = check_contract(request.layer, loaded.layer)
    if reason is not None:
        return _refusal(ContractError, request, candidate, [reason])
    implementation = _loads.implementation(request, loaded.layer)
    reason = check_mode(request, loaded.layer)
    if reason is not None:
        return replace(_refusal(ContractError, request, candidate, [reason]), cause=Cause.MODE)
    entry = find_quarantined(request, implementation)
    if entry is not None:
        return _out(entry, candidate)
    reasons = plugin_manager().check_layer(request, candidate, loaded.layer)
    if reasons:
        return _refusal(ContractError, request, candidate, reasons)
    return Resolution(
        request,
        implementation=implementation,
        candidate=candidate,
        origin=loaded.origin,
        checked=loaded.checked,
    )


def _adapted(layer: Layer | None, loaded: LoadedLayer | Exception) -> LoadedLayer | Exception:
    """Make a kernel that must know the layer fit it, once; the layer keeps it, or neither would ever go."""
    if layer is None or isinstance(loaded, Exception) or loaded.adapt is None:
        return loaded
    known = layer.adapted.get(id(loaded))
    if known is None:
        try:
            with _outside_of_tracing():
                made = replace(loaded, layer=loaded.adapt(layer), adapt=None)
        except Exception as error:  # any fault of a kernel is a reason, never a crash of the model
            return error
        known = layer.adapted.setdefault(id(loaded), (loaded, made))  # the number stays that of what is kept
    return cast(LoadedLayer, known[1])


def _refusal(kind: type[ResolutionError], request: LayerRequest, candidate: Candidate, reasons: list[str]) -> Refusal:
    reason = "; ".join(reasons)
    return Refusal(reason, candidate, candidate.plugin, kind(f"{candidate.label}: {reason}", request=request))


def _reason(error: Exception, candidate: Candidate) -> str:
    if isinstance(error, ResolutionError):
        return str(error)
    told = f"{type(error).__name__}: {error}".rstrip(": ")
    plugin = getattr(error, "kernels_plugin", candidate.plugin)
    return told if plugin == candidate.plugin else f"{told} (raised by plugin {plugin!r})"


# --- Loading, once ------------------------------------------------------------------------------


@dataclass
class _Load:
    """One source being loaded, or the outcome."""

    lock: threading.Lock
    outcome: LoadedLayer | Exception | None = None


class _Loads:
    """Turns each source into a layer once for a type of device; a failure is remembered until a change.

    Equal sources share a load. One that equals no other is referred to weakly: it goes with the scope
    that named it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weak: weakref.WeakKeyDictionary[object, dict[str, _Load]] = weakref.WeakKeyDictionary()
        self._strong: dict[object, tuple[object, dict[str, _Load]]] = {}

    def load(self, request: LayerRequest, candidate: Candidate) -> LoadedLayer | Exception:
        source = candidate.source
        if isinstance(source, type | types.FunctionType):  # nothing to fetch, nothing to remember
            return self._load(request, source)
        load = self._find(source, request.device.type)
        waited = load.lock.acquire(timeout=scope.PATIENCE)
        try:
            if load.outcome is None:
                load.outcome = self._load(request, source)
                if isinstance(load.outcome, Exception):
                    plugin_manager().kernel_failed(request, candidate, load.outcome)
                    _strip(load.outcome)
            return load.outcome
        finally:
            if waited:
                load.lock.release()

    def _find(self, source: object, device: str) -> _Load:
        with self._lock:
            return self._loads(source).setdefault(device, _Load(threading.Lock()))

    def _loads(self, source: object) -> dict[str, _Load]:
        """Return the loads of a source, by type of device."""
        if type(source).__eq__ is object.__eq__:  # an object like no other
            with contextlib.suppress(TypeError):  # it does not allow weak references
                return self._weak.setdefault(source, {})
        return self._strong.setdefault(_identity(source), (source, {}))[1]

    def _load(self, request: LayerRequest, source: object) -> LoadedLayer | Exception:
        try:
            with _outside_of_tracing():
                layer = plugin_manager().load_layer(request, source)
        except Exception as error:  # any fault of a kernel is a reason, never a crash of the model
            return error
        if layer is None:
            return LoadError(
                f"no plugin knows how to load a {type(source).__name__}: use a repository, an object with "
                "load(), an nn.Module class or a function"
            )
        return layer if isinstance(layer, LoadedLayer) else LoadedLayer(layer, source_label(layer))

    def implementation(self, request: LayerRequest, layer: KernelLayer) -> Callable[..., Any]:
        """Return what a call calls: a class serves with its `forward`, run on the module served."""
        if not isinstance(layer, type):
            return layer
        forward: Callable[..., Any] = cast(Any, layer).forward
        if request.layer is None or not request.layer.is_function:
            return forward
        # A function has no module: lend it an empty one, kept on the class so that it goes with it.
        with self._lock:
            if BOUND not in vars(layer):
                setattr(layer, BOUND, types.MethodType(forward, layer()))
        return cast(Callable[..., Any], getattr(layer, BOUND))

    def forget_failures(self) -> None:
        """Let sources that failed be tried again."""
        with self._lock:
            for loads in (*self._weak.values(), *(loads for _, loads in self._strong.values())):
                for device in [d for d, load in loads.items() if isinstance(load.outcome, Exception)]:
                    del loads[device]


_loads = _Loads()


def _strip(error: BaseException | None) -> None:
    """Drop the tracebacks of an error that is remembered: their frames would keep the source alive."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _identity(source: object) -> object:
    """Return a key for a source: equal values share one load."""
    try:
        hash(source)
    except TypeError:
        return (type(source), id(source))
    return (type(source), source)


def _outside_of_tracing() -> contextlib.AbstractContextManager[object]:
    """Leave modes such as that of `torch.export`, so that kernels can make real tensors when imported."""
    stack = contextlib.ExitStack()
    stack.enter_context(no_torch_function())
    stack.enter_context(no_dispatch_modes())
    return stack


def forget() -> None:
    """Decide anew on the next call, everywhere; what was loaded stays loaded.

    For plugins whose offers changed: `register_kernel_mapping` calls it.
    """
    _loads.forget_failures()
    scope.forget()


plugin_manager().on_change.append(forget)
on_change.append(scope.forget)
plugin_manager().register(CorePlugin(), "core")
