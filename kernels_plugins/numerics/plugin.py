"""Plugin `numerics`: kernels serve only with the properties of numbers that are required.

While nothing is required and nothing was found out, no file is read and no forward is wrapped.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kernels_core import (
    NUMERICS,
    ArgumentError,
    Candidate,
    ConfigSection,
    KernelLayer,
    LayerRequest,
    Mode,
    Numeric,
    Reference,
    Refusal,
    Resolution,
    Scope,
    WantedNumerics,
    configured,
    forget,
    hookimpl,
    plugin_manager,
    resolve,
    serving_forward,
    set_module,
    strict,
    warn_once,
)

if TYPE_CHECKING:
    from .invariance import Judgement

Forward = Callable[..., Any]

_REFUSED = "numbers as required: "
_lock = threading.Lock()
_registered: tuple[Numeric, ...] = ()
_busy: ContextVar[bool] = ContextVar("kernels_plugins_numerics_busy", default=False)
_sure: ContextVar[bool] = ContextVar("kernels_plugins_numerics_sure", default=False)
"""Whether a decision is for a call that nothing can be tried on: a kernel that is not known is refused then."""


class numerics(Scope):  # noqa: N801 - a context manager that reads like a statement
    """Let only kernels serve whose numbers have some properties, which are found out bit by bit.

    A kernel is judged at its first eager call of each kind (dtype, and last size of each tensor), on copies. One that
    lacks a property is refused, with the smallest input that was found to show it, and the next candidate is judged;
    so is the reference, where it serves: one that lacks it, too, is a warning, and an error in strict mode. Compiled
    calls are served by kernels that are known to have the properties. Applies to the thread or asyncio task that
    enters it.

    Args:
        *names: `"deterministic"`, `"batch_invariant"`, `"recompute_equal"`: see `NUMERICS`.

    Raises:
        ArgumentError: For an unknown name, or none.
        ArgumentTypeError: For a name that is no text.

    Example:
        >>> @use_kernel_forward_from_hub("Double")
        ... def double(x):
        ...     return x + x
        >>> def kernel(x):
        ...     return 2 * x if len(x) > 64 else x + x + 1e-7
        >>> with use_kernel_mapping({"Double": {"cpu": kernel}}), numerics("batch_invariant"):
        ...     y = double(torch.ones(2, 8))
        ...     resolve(double, device="cpu", mode=Mode.INFERENCE).origin
        'reference'
    """

    def __init__(self, *names: Numeric) -> None:
        """Check the names; nothing changes before the block is entered."""
        super().__init__(WantedNumerics(_checked(names, "numerics")))


def register_numerics(*names: Numeric) -> None:
    """Require properties of all kernels of this process, from now on, as `numerics` does in a block.

    Args:
        *names: As for `numerics`; without any, nothing is required any more, but by blocks and the configuration file.

    Raises:
        ArgumentError: For an unknown name. Nothing changes then.
        ArgumentTypeError: For a name that is no text.

    Example:
        >>> register_numerics("deterministic", "batch_invariant")
        >>> register_numerics()
    """
    global _registered
    found = _checked(names, "register_numerics") if names else ()
    with _lock:
        _registered = found
    forget()


def _checked(names: Sequence[str], where: str) -> tuple[Numeric, ...]:
    from .properties import check_names

    if not names:
        raise ArgumentError(f"{where} names no property: there are {', '.join(NUMERICS)}.")
    found = check_names(names, where)
    if "numerics" not in plugin_manager().plugins():
        warn_once("The plugin numerics is blocked by KERNELS_PLUGINS or a configuration file: it refuses no kernel.")
    return found


def required(request: LayerRequest) -> tuple[Numeric, ...]:
    """Return the properties that the implementation for a request must have."""
    return _wanted(request, {True})


def _wanted(request: LayerRequest, kinds: set[bool]) -> tuple[Numeric, ...]:
    """Return the properties that are wanted for a request: those that are required (True), or only to be found out."""
    names = {*_registered, *(configured("numerics") or ())}
    found = (payload for payload in request.scopes if isinstance(payload, WantedNumerics))
    names.update(*(payload.names for payload in found if payload.required in kinds))
    return tuple(name for name in NUMERICS if name in names)


# --- Hooks -----------------------------------------------------------------------------------------


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `numerics` in the configuration file."""
    return {"numerics": lambda section: _checked(section.as_texts(), "numerics")}


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a kernel that is known to lack a property, and for calls that nothing can be tried on one not known."""
    names = required(request)
    if not names or request.layer is None:
        return None
    from ..oracle.probe import implementation_of

    known = _verdicts(request, implementation_of(layer, function=request.layer.is_function))
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
    from . import store

    names = required(request)
    if resolution is None or request.layer is None or not (names or store.is_used()):
        return resolution
    found = _verdicts(request, resolution.implementation or request.layer.reference)
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
    if resolution.request.layer is None or not (names := _wanted(resolution.request, {True, False})):
        return None
    return lambda forward: _judging(resolution, names, forward)


# --- Findings --------------------------------------------------------------------------------------


def _verdicts(request: LayerRequest, implementation: Forward) -> dict[str, Judgement]:
    from . import store

    assert request.layer is not None
    return store.verdicts(store.key_of(request.layer, implementation, request.device))


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
    served: dict[Any, Forward] = {}

    def chosen(args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool) -> Forward:
        """Return the forward that serves such calls: this one, or that of the next candidate that may serve them."""
        module, given = (None, args) if layer.is_function else (args[0], args[1:])
        call = Call(module, given, kwargs, layer.signature)
        if keep:
            token = _busy.set(True)
            try:
                found = judged(Recorded("", layer, call.snapshot()), resolution, names)
            finally:
                _busy.reset(token)
        else:
            found = _verdicts(request, resolution.implementation or layer.reference)
        passed_on = any(one.why == NOT_TAKEN for one in found.values())  # it will do so in this call, too
        if passed_on or not (_lacking(found, must) or _missing(found, must)):
            return forward
        if keep:
            forget()  # what the next calls, and receipts, are decided by has changed
        token = _sure.set(not keep)
        try:
            with numerics(*must):  # which may be closed by now, where `kernelize` has chosen
                mode = Mode.TRAINING if torch.is_grad_enabled() and call.records else Mode.INFERENCE
                decided = resolve(layer, device=request.device, mode=mode)
                serving = serving_forward(decided)  # raises in strict mode where nothing may serve
                if decided.is_reference and resolution.is_reference:
                    return forward
                return plugin_manager().wrap_forward(decided, serving) if keep else serving
        finally:
            _sure.reset(token)

    @functools.wraps(forward)
    def judging(*args: Any, **kwargs: Any) -> Any:
        if _busy.get():
            return forward(*args, **kwargs)
        found = [leaf for value in (*args, *kwargs.values()) for _, leaf in leaves(value)]
        kind = (
            *((leaf.dtype, *leaf.shape[-1:]) for leaf in found if isinstance(leaf, torch.Tensor)),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(request.device.type),
            None if layer.is_function else id(args[0]),  # modules of one class may differ in their sizes
        )
        serving = served.get(kind)
        if serving is None:
            keep = not is_observed()
            serving = chosen(args, kwargs, keep)
            if keep:
                served[kind] = serving
        return serving(*args, **kwargs)

    return judging


set_module("kernels_plugins", globals())
