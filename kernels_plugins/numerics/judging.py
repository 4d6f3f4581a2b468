"""The hooks that judge kernels, registered once a property of numbers is required or was found out.

They are a plugin of their own, for most programs never require any: their decisions do not pay for these.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kernels_core import (
    Candidate,
    KernelLayer,
    LayerRequest,
    Mode,
    Numeric,
    Reference,
    Refusal,
    Resolution,
    Scope,
    WantedNumerics,
    forget,
    hookimpl,
    plugin_manager,
    resolve,
    serving_forward,
    strict,
    warn_once,
)

from . import store
from .rows import ABOUT_THE_CALL, EMPTY, SILENT
from .wanted import found_out, required, wanted

if TYPE_CHECKING:
    from .invariance import Judgement

Forward = Callable[..., Any]

NAME = "numerics-required"
_REFUSED = "numbers as required: "
_busy: ContextVar[bool] = ContextVar("kernels_plugins_numerics_busy", default=False)
_sure: ContextVar[bool] = ContextVar("kernels_plugins_numerics_sure", default=False)
"""Whether a decision is for a call that nothing can be tried on: a kernel that is not known is refused then."""


@dataclass(frozen=True, eq=False)
class _OfThisCall:
    """The payload of a scope in which one call is decided: implementations from which nothing is known for it."""

    found: Mapping[str, Mapping[str, Judgement]]


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a kernel that is known to lack a property, and for calls that nothing can be tried on one not known."""
    names = required(request)
    if not names or request.layer is None:
        return None
    from ..oracle.probe import implementation_of

    known = _verdicts(request, implementation_of(layer, function=request.layer.is_function), candidate)
    unknown = request.is_traced or _sure.get()
    for name in names:
        finding = known.get(name)
        if getattr(layer, name, None) is False:
            return f"{_REFUSED}it declares {name} = False"
        if finding is None and unknown:
            return f"{_REFUSED}{name} is not known of it, and {_advice(name)}"
        if finding is not None and not finding.has:
            return f"{_REFUSED}it is not {_word(finding)}{name}: {finding.why}"
    return None


def _word(finding: Judgement) -> str:
    return "known to be " if finding.has is None else ""


def _advice(name: str) -> str:
    return (
        "a call that is traced or captured cannot be tried: make such a call in eager mode before, or run "
        f"verify(model, inputs, numerics=[{name!r}])"
    )


@hookimpl(wrapper=True)
def kernels_rank_candidates(request: LayerRequest) -> Generator[None, Any, Any]:
    """Leave out a reference that a measurement has chosen and that lacks a property, where there is another one."""
    ranked: Sequence[Candidate] | None = yield
    if not ranked or request.layer is None or not (names := required(request)):
        return ranked
    if not _lacking(_verdicts(request, request.layer.reference), names):
        return ranked
    return [one for one in ranked if one.source is not Reference] or ranked


@hookimpl(wrapper=True)
def kernels_resolve_forward(request: LayerRequest) -> Generator[None, Any, Any]:
    """Add the findings to the decision, and judge the reference where it serves."""
    resolution: Resolution | None = yield
    names = required(request)
    if resolution is None or request.layer is None or not (found_out or wanted(request, also_found=True)):
        return resolution
    found = _verdicts(request, resolution.implementation or request.layer.reference, resolution.candidate)
    texts: dict[str, str] = {name: str(finding) for name, finding in found.items()}
    texts.update({name: "not known: it is found out at the first eager call" for name in _missing(found, names)})
    resolution = replace(resolution, checked={**resolution.checked, **texts})
    if not names or not resolution.is_reference:
        return resolution
    lacking = _lacking(found, names)
    if request.is_traced or _sure.get():
        lacking |= {name: f"it is not known to be {name}, and {_advice(name)}" for name in _missing(found, names)}
    if lacking:
        reason = f"{_REFUSED}of the reference itself, {'; '.join(lacking.values())}"
        refusal = Refusal(reason, plugin="numerics")
        resolution = replace(resolution, refusals=(*resolution.refusals, refusal), note="")
        if not strict():
            warn_once(f"The reference serves {request.place}, though it lacks what is required: {reason}")
    elif (
        request.layer.use_fallback
        and resolution.refusals
        and not resolution.note
        and all(one.reason.startswith(_REFUSED) for one in resolution.refusals)
    ):  # not an error in strict mode: the reference is the right answer, or will be judged at its first call
        unknown = _missing(found, names)
        how = f"judged at its first call: {', '.join(unknown)}" if unknown else f"{' and '.join(names)}, as required"
        resolution = replace(resolution, note=f"the reference is {how}")
    return resolution


@hookimpl
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Forward], Forward] | None:
    """Judge an implementation at its first call of each kind."""
    if resolution.request.layer is None or not (names := wanted(resolution.request, also_found=True)):
        return None
    return lambda forward: _judging(resolution, names, forward)


# --- Findings --------------------------------------------------------------------------------------


def _verdicts(
    request: LayerRequest, implementation: Forward, candidate: Candidate | None = None
) -> dict[str, Judgement]:
    assert request.layer is not None
    key = store.key_of(request.layer, implementation, request.device)
    found = store.verdicts(key, candidate, training=Mode.TRAINING in request.mode)
    return {**found, **_of_this_call(request).get(key, {})}


def _of_this_call(request: LayerRequest) -> Mapping[str, Mapping[str, Judgement]]:
    return next((payload.found for payload in request.scopes if isinstance(payload, _OfThisCall)), {})


def _lacking(found: Mapping[str, Judgement], names: Sequence[str]) -> dict[str, str]:
    """Return what an implementation was found not to have, or cannot be known to have."""
    return {
        name: f"it is not {_word(found[name])}{name}: {found[name].why}"
        for name in names
        if name in found and not found[name].has
    }


def _missing(found: Mapping[str, Judgement], names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in found]


# --- Calls -----------------------------------------------------------------------------------------


def _judging(resolution: Resolution, names: Sequence[Numeric], forward: Forward) -> Forward:
    """Return a forward that judges the implementation before its first call of each kind."""
    from kernels_core.replay import Call, is_observed, leaves

    from ..oracle.inputs import Recorded
    from .invariance import NOT_TAKEN
    from .judge import judged

    layer, request, must = resolution.request.layer, resolution.request, required(resolution.request)
    assert layer is not None
    served: dict[Any, tuple[weakref.ref[Any], Forward]] = {}

    def chosen(args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool) -> tuple[Forward, bool]:
        """Return the forward that serves such calls: this one, or that of the next candidate that may serve them.

        And whether it serves later ones, too: where the numbers of a call showed nothing, those of the next one may.
        """
        module, given = (None, args) if layer.is_function else (args[0], args[1:])
        call = Call(module, given, kwargs, layer.signature)
        mode = Mode.TRAINING if torch.is_grad_enabled() and call.records else Mode.INFERENCE
        if keep:
            token = _busy.set(True)
            try:
                found = judged(Recorded("", layer, call.snapshot()), resolution, names, mode=mode)
            finally:
                _busy.reset(token)
        else:
            found = _verdicts(request.in_mode(mode), resolution.implementation or layer.reference, resolution.candidate)
        passed_on = any(one.why in (NOT_TAKEN, EMPTY) for one in found.values())  # it will do so in this call, too
        if passed_on or not (_lacking(found, must) or _missing(found, must)):
            return forward, keep
        here = {name: one for name, one in found.items() if one.why in ABOUT_THE_CALL}
        lasts = keep and not any(one.why == SILENT for one in here.values())
        others = _of_this_call(request)
        if here:
            key = store.key_of(layer, resolution.implementation or layer.reference, request.device)
            others = {**others, key: here}
        elif keep:
            forget()  # what the next calls, and receipts, are decided by has changed
        token = _sure.set(not keep)
        try:
            # The scope of what is wanted may be closed by now, where `kernelize` has chosen.
            with Scope(WantedNumerics(must)), Scope(_OfThisCall(others)) if others else nullcontext():
                decided = resolve(layer, device=request.device, mode=mode)
                serving = serving_forward(decided)  # raises in strict mode where nothing may serve
                if decided.is_reference and resolution.is_reference:
                    return forward, lasts
                return (plugin_manager().wrap_forward(decided, serving) if keep else serving), lasts
        finally:
            _sure.reset(token)

    @functools.wraps(forward)
    def judging(*args: Any, **kwargs: Any) -> Any:
        if _busy.get():
            return forward(*args, **kwargs)
        owner = layer if layer.is_function else args[0]
        found = [leaf for value in (*args, *kwargs.values()) for _, leaf in leaves(value)]
        kind = (
            *(
                (type(leaf), leaf.dtype, leaf.dim(), leaf.numel() > 0, *leaf.shape[-1:])
                for leaf in found
                if isinstance(leaf, torch.Tensor)
            ),
            *store.words_of((*args, *kwargs.items())),
            torch.is_grad_enabled(),
            any(leaf.requires_grad for leaf in found if isinstance(leaf, torch.Tensor)),
            torch.is_autocast_enabled(request.device.type),
            *(() if layer.is_function else (id(owner), args[0].training)),  # modules of one class may differ in sizes
        )
        of, serving = served.get(kind, (None, forward))
        if of is None or of() is not owner:  # a later module may have the id of one that is gone
            serving, lasts = chosen(args, kwargs, not is_observed())
            if lasts:  # two threads may judge one kind at once, and find the same
                served[kind] = weakref.ref(owner), serving
        return serving(*args, **kwargs)

    return judging
