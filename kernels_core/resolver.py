"""The cold path: `decide`, the only way to a decision; `resolve` and the errors of those who decide.

Nothing here runs on a warm call. While a thread decides, decorated layers that plugins call run on
their reference, so that nothing recurses and no two decisions wait for each other.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .answer import IN_QUARANTINE, CorePlugin, ModesDiffer, exclusion
from .decisions.replay import VARIABLE, FileReplay, replaying
from .device import Device, as_torch_device, device_capability
from .environment import mapping_disabled, strict
from .errors import DecisionError, KernelsWarning, NoKernelError, PluginError, require_type
from .guards.quarantine import on_change
from .guards.tensors import on_odd_parameter
from .isolation import FAULTS, raised_in
from .layer import Layer, decorated_layer
from .loading import forget_failures
from .mode import Mode, check_call_mode
from .plugins import plugin_manager
from .resolution import Candidate, Cause, JointRequest, LayerRequest, Refusal, Resolution, rank_offers
from .scopes import frame as frames
from .scopes.frame import Frame, here
from .settings import reader
from .warning import warn_once

Decorated = str | Layer | torch.nn.Module | type[torch.nn.Module] | Callable[..., Any]
"""A layer name, or an object with a layer."""


def resolve(
    layer_or_name: Decorated,
    *,
    device: torch.device | Device | str,
    mode: Mode,
    candidate: Candidate | None = None,
    subclasses: frozenset[type[torch.Tensor]] = frozenset(),
) -> Resolution:
    """Decide which kernel would serve a layer here and now, without running it.

    May download and import kernels, as the first call would.

    Args:
        layer_or_name: A layer name, a `Layer`, or a decorated module, class or function.
        device: Device of the call, such as `"cuda:1"`; without an index, the current device.
        mode: `Mode.INFERENCE` or `Mode.TRAINING`, with or without `Mode.TORCH_COMPILE`.
        candidate: The only candidate to try, in place of those that plugins offer.
        subclasses: The classes of the tensors of the call that are not plain, such as `DTensor`.

    Returns:
        The decision, with every refusal; for the reference, if no kernel serves.

    Raises:
        ArgumentError: If device or mode cannot be those of a call.
        ArgumentTypeError: If the first argument is not decorated.

    Example:
        >>> resolve("no such layer", device="cpu", mode=Mode.INFERENCE).origin
        'reference'
    """
    request = replace(_request_of(layer_or_name, device, mode), subclasses=subclasses)
    if frames.resolving.get():  # a hook that answers another request calls this: do not recurse
        return Resolution(request, note="asked while a layer is being resolved")
    if candidate is None or mapping_disabled():
        return decide(request.layer or request.layer_name, request.device, (mode,), subclasses=subclasses)
    with _resolving():
        return CorePlugin(candidate).kernels_resolve_forward(request)


def find_candidates(
    layer_or_name: Decorated,
    *,
    device: torch.device | Device | str,
    mode: Mode,
) -> tuple[list[Candidate], list[Refusal]]:
    """Return every candidate for calls of a layer, best first, and nothing loaded.

    Arguments and errors are those of `resolve`.

    Returns:
        The candidates, and the refusals of kernels that are offered for other devices or modes, and of plugins
        that failed.

    Example:
        >>> find_candidates("no such layer", device="cpu", mode=Mode.INFERENCE)
        ([], [])
    """
    request = _request_of(layer_or_name, device, mode)
    if mapping_disabled():
        return [], []
    with _resolving():
        candidates, misfits, failures = rank_offers(plugin_manager().hook.kernels_find_candidates(request=request))
    return candidates, [*failures, *misfits]


def _request_of(layer_or_name: Decorated, device: torch.device | Device | str, mode: Mode) -> LayerRequest:
    layer = layer_or_name if isinstance(layer_or_name, str | Layer) else decorated_layer(layer_or_name)
    return _request(layer, as_torch_device(device), (check_call_mode(mode),))


def _request(
    layer: Layer | str,
    device: torch.device,
    modes: Sequence[Mode],
    frame: Frame | None = None,
    subclasses: frozenset[type[torch.Tensor]] = frozenset(),
    scopes: tuple[object, ...] | None = None,
    passed_on: tuple[Callable[..., Any], ...] = (),
) -> LayerRequest:
    name, known = (layer, None) if isinstance(layer, str) else (layer.name, layer)
    kind = JointRequest if len(modes) > 1 else LayerRequest
    if scopes is None:
        scopes = (here() if frame is None else frame).payloads()
    return kind(name, device, modes[0], known, device_capability(device), scopes, subclasses, passed_on)


# --- The decision ----------------------------------------------------------------------------------


def decide(
    layer: Layer | str,
    device: torch.device,
    modes: Sequence[Mode],
    *,
    frame: Frame | None = None,
    notify: Literal["plugins", "all"] | None = None,
    subclasses: frozenset[type[torch.Tensor]] = frozenset(),
    scopes: tuple[object, ...] | None = None,
    passed_on: tuple[Callable[..., Any], ...] = (),
    after: int = 0,
) -> Resolution:
    """Decide which kernel serves a layer in a frame (None: the active one); the only way to a decision.

    It is for one mode, or for the two of eager or of traced calls. If these need two decisions, it raises `ModesDiffer`
    before it loads a kernel for only one of them: a training run does not fetch what is registered for inference.
    `notify="plugins"` calls `kernels_resolved`; `"all"` also warns the user of each refused candidate. Payloads of
    scopes that are not open any more can be given as `scopes`, and kernels that have passed a call on as `passed_on`.
    `after=1` decides for calls that the kernel passes on which serves otherwise, `after=2` for those that the next one
    passes on, too; if it was the reference that returned `NotImplemented`, `request.passed_on` lacks an item.
    """
    manager = plugin_manager()
    hook = manager.hook
    where = functools.partial(decide, layer, device, frame=frame, subclasses=subclasses)
    anew = functools.partial(where, scopes=scopes, passed_on=passed_on)
    if after:
        before = anew(modes, after=after - 1)
        passed_on = (*before.request.passed_on, *filter(None, [before.implementation]))
    request = _request(layer, device, modes, frame, subclasses, scopes, passed_on)
    with _resolving():
        resolution = _decided_before(request)
        if resolution is None:
            # Two look-ups where there is no file, as nearly always.
            in_use = VARIABLE in os.environ or not reader.known.nothing
            token = replaying.set(replay := FileReplay.find(request) if in_use else None)
            try:
                resolution = hook.kernels_resolve_forward(request=request) or Resolution(request)
            except (PluginError, KernelsWarning):  # raised in strict mode only, and where warnings are errors
                raise
            except FAULTS as error:
                manager.report(raised_in("kernels_resolve_forward", "core", error))
                resolution = Resolution(request)
            finally:
                replaying.reset(token)
            # The request may be another one: that for training, where a candidate is the same for all modes.
            resolution = _unless_excluded(
                resolution if resolution.request is request else replace(resolution, request=request)
            )
            if replay is not None:
                resolution = replay.checked(resolution)
        # A hook has read the mode: its answer may be another one for the second mode.
        if request.depends_on_mode:
            second = anew(modes[1:], after=after)
            if second.implementation is not resolution.implementation:
                raise ModesDiffer
        if len(modes) > 1:
            resolution = replace(resolution, request=request.in_mode(modes[0]), every_mode=True)
        if notify is not None:
            hook.kernels_resolved(resolution=resolution)
        if notify == "all" and resolution.refusals and not must_raise(resolution):
            which = " in some calls" if passed_on else ""
            for refusal in resolution.refusals:
                # That a kernel passes calls on to another one is no news for the user, if it is not in quarantine.
                unwanted = resolution.is_reference and not resolution.note
                proved_wrong = refusal.reason.startswith(IN_QUARANTINE)
                is_news = not passed_on or unwanted or proved_wrong or refusal.cause is not Cause.MODE
                if is_news and refusal.candidate is not None:  # a plugin that failed was reported already
                    warn_once(
                        f"A kernel for {resolution.subject} is not used{which}, {resolution.origin} runs instead: "
                        f"{refusal}",
                        (resolution.request.layer_name, str(refusal)),
                    )
    return resolution


@contextlib.contextmanager
def _resolving() -> Iterator[None]:
    """Mark this thread or task as resolving, under the modes in which modules expect to be imported."""
    token = frames.resolving.set(True)
    try:
        # What a kernel makes at import would be inference tensors, which autograd refuses ever after.
        with torch.inference_mode(False):
            yield
    finally:
        frames.resolving.reset(token)


@dataclass(frozen=True, eq=False)
class Decided:
    """The payload of a scope that has the decision for some requests, whatever plugins offer, and None for others."""

    decision: Callable[[LayerRequest], Resolution | None]


def _decided_before(request: LayerRequest) -> Resolution | None:
    """Return the decision that asks no plugin: mappings off, no policy, or the innermost `Decided`'s."""
    if mapping_disabled():
        return Resolution(request, note="DISABLE_KERNEL_MAPPING is on")
    if missing := plugin_manager().missing():  # also where a plugin has an answer that needs no candidates
        refusal = Refusal(str(missing), plugin=getattr(missing, "plugin", ""), error=missing, cause=Cause.POLICY)
        return Resolution(request, refusals=(refusal,))
    decisions = (payload.decision(request) for payload in request.scopes if isinstance(payload, Decided))
    return next(filter(None, decisions), None)


def _unless_excluded(resolution: Resolution) -> Resolution:
    """Return a decision, or the reference in place of a kernel that is excluded and on which a plugin insists."""
    request, implementation = resolution.request, resolution.implementation
    if implementation is None:
        return resolution
    candidate = resolution.candidate or Candidate(implementation)
    refusal = exclusion(request, candidate, implementation, resolution.origin, resolution.kernel_layer)
    if refusal is None:
        return resolution
    return Resolution(request, refusals=(*resolution.refusals, refusal), misfits=resolution.misfits)


# --- For those who decide --------------------------------------------------------------------------


def ready() -> int:
    """Find the plugins, if that was not done yet, and return the generation that a decision now belongs to."""
    if not mapping_disabled():
        plugin_manager().plugins()
    return frames.generation()


def must_raise(resolution: Resolution) -> bool:
    """Return whether a call must fail rather than run the reference."""
    layer = resolution.request.layer
    if not resolution.is_reference or layer is None or resolution.note:
        return False
    return not layer.use_fallback or (strict() and bool(resolution.refusals)) or find_drift(resolution) is not None


def find_drift(resolution: Resolution) -> DecisionError | None:
    """Return the error of a decision file that does not hold, if that is why the reference was decided."""
    found = (refusal.error for refusal in resolution.refusals if isinstance(refusal.error, DecisionError))
    return next(found, None) if resolution.is_reference else None


def no_kernel(resolution: Resolution) -> NoKernelError:
    """Make the error of a call that no kernel serves, with all refusals."""
    if (drift := find_drift(resolution)) is not None:  # a new one each time, or tracebacks would add up
        place = {"layer": drift.layer, "expected": drift.expected, "found": drift.found}
        return DecisionError(str(drift), request=resolution.request, **place)
    why = "\n".join(resolution.reasons) or "  no candidate was offered"
    rule = "KERNELS_STRICT is on" if strict() else "the layer was decorated with use_fallback=False"
    return NoKernelError(
        f"No kernel serves {resolution.subject}, and {rule}:\n{why}\n"
        "Register a kernel that fits with register_kernel_mapping, or allow the reference.",
        request=resolution.request,
        refusals=resolution.refusals,
    )


def serving_forward(resolution: Resolution) -> Callable[..., Any]:
    """Return the forward that serves calls by a decision: that of the kernel, else the reference.

    For a call that the kernel does not take, it returns `NotImplemented`.

    Raises:
        NoKernelError: If the reference must not serve.

    Example:
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x):
        ...     return x + x
        >>> serving_forward(resolve(double, device="cpu", mode=Mode.INFERENCE))(2)
        4
    """
    require_type(resolution, Resolution, "resolution")
    if must_raise(resolution):
        raise no_kernel(resolution)
    assert resolution.request.layer is not None
    return resolution.implementation or resolution.request.layer.reference


def forget() -> None:
    """Decide anew on the next call, everywhere; loaded kernels stay loaded. The configuration file is read again.

    For plugins whose offers changed: `register_kernel_mapping` calls it.
    """
    reader.forget_settings()  # first: decisions after the last line read it again
    forget_failures()  # what has failed is tried again, too
    frames.forget()


plugin_manager().on_change.append(forget)
on_change.append(frames.forget)  # not `forget`: loads that have failed need not be tried again
on_odd_parameter.append(frames.forget)
plugin_manager().register(CorePlugin(), "core", trusted=True)
