"""Plugin `probe`: kernels are tried at their first call, and serve the calls that they proved to be capable of.

While it is off, which is the default, no forward is wrapped and no file is read.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch

from kernels_core import (
    Candidate,
    KernelLayer,
    LayerRequest,
    Mode,
    PluginError,
    Resolution,
    ScopeError,
    VerificationError,
    error_text,
    forget,
    hookimpl,
    plugin_manager,
    quarantine,
    resolve,
    serving_forward,
    set_module,
    setting,
    warn_once,
)

Forward = Callable[..., Any]

VARIABLE = "KERNELS_PROBE"
_lock = threading.Lock()
_open = 0
_busy: ContextVar[bool] = ContextVar("kernels_plugins_oracle_prober_busy", default=False)
_kernels: weakref.WeakKeyDictionary[Any, KernelLayer] = weakref.WeakKeyDictionary()
"""The class or function behind each implementation, for its declarations."""


class probing:  # noqa: N801 - a context manager that reads like a statement
    """Try each kernel at its first eager call, and let it serve the calls that it proves to be capable of.

    A kernel that loses gradients does not serve training then, one that cannot be traced does not serve
    compiled calls, and one that is wrong serves nothing. A kernel that declares otherwise causes a warning.
    Results are kept in a file for each kernel, version of PyTorch and kind of device. Applies to the whole process
    while it is open. `KERNELS_PROBE=1` does the same; `KERNELS_PROBE=cached` uses the results of earlier probes,
    and tries nothing.

    Example:
        >>> with probing():
        ...     y = torch.nn.Identity()(torch.ones(1))
    """

    def __enter__(self) -> probing:
        """Probe, from the next call on."""
        global _open
        with _lock:
            _open += 1
        forget()
        return self

    def __exit__(self, *error: object) -> None:
        global _open
        with _lock:
            if _open == 0:
                raise ScopeError("No probing is open: leave it once for each time that it is entered.")
            _open -= 1
        forget()


def _setting() -> str:
    """Return `"on"`, `"cached"` or `"off"`."""
    if _open:
        return "on"
    text = setting(VARIABLE)
    if isinstance(text, bool):
        return "on" if text else "off"
    if text.lower() == "cached":
        return "cached"
    message = f"{VARIABLE}={text!r} is not understood, so nothing is probed: write 1, 0 or cached."
    plugin_manager().report(PluginError(message, plugin="probe"))  # raised here, it would refuse every kernel
    return "off"


# --- Hooks ----------------------------------------------------------------------------------------


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Refuse a kernel for calls that it proved to be incapable of."""
    if request.layer is None or _setting() == "off":
        return None
    from .probe import implementation_of

    implementation = implementation_of(layer, function=request.layer.is_function)
    _kernels[_function(implementation)] = layer  # the function itself: a bound method is made anew for each look
    _, report = _known(request, implementation)
    return _refusal(report, request.mode) if report is not None else None


@hookimpl(wrapper=True)
def kernels_resolve_forward(request: LayerRequest) -> Generator[None, Any, Any]:
    """Add the results of probes to the decision, for receipts."""
    resolution: Resolution | None = yield
    if resolution is None or resolution.implementation is None or request.layer is None or _setting() == "off":
        return resolution
    _, report = _known(request, resolution.implementation)
    if report is None:
        return resolution
    results = ", ".join(f"{'' if probe.ok else 'not '}{name}" for name, probe in report.probes.items())
    return replace(resolution, checked={**resolution.checked, "probes": results})


@hookimpl
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Forward], Forward] | None:
    """Probe a kernel at its first call, unless it was probed before."""
    if resolution.request.layer is None or resolution.implementation is None or _setting() != "on":
        return None
    key, report = _known(resolution.request, resolution.implementation)
    return (lambda forward: _probed(resolution, key, forward)) if report is None else None


def _known(request: LayerRequest, implementation: Any) -> tuple[str, Any]:
    """Return the key of a kernel in the cache of probes, and the report there, if there is one."""
    from . import probe_cache  # only where something is probed

    assert request.layer is not None
    key = probe_cache.key_of(request.layer, implementation, request.device)
    return key, probe_cache.find(key)


def _refusal(report: Any, mode: Mode) -> str | None:
    """Return why a kernel does not serve calls of a mode, or None."""
    needs = [("forward", "it was probed, and is wrong")]
    if Mode.TRAINING in mode:
        needs.append(("gradients", "it was probed, and cannot be trained with"))
    if Mode.TORCH_COMPILE in mode:
        needs.append(("compile", "it was probed, and cannot be traced without graph breaks"))
    failed = report.failed
    return next((f"{reason}: {failed[name]}" for name, reason in needs if name in failed), None)


# --- The first call -------------------------------------------------------------------------------


def _probed(resolution: Resolution, key: str, forward: Forward) -> Forward:
    """Return a forward that tries the kernel before its first call."""
    from kernels_core.replay import Call, is_observed

    from . import probe_cache
    from .inputs import Recorded
    from .probe import probe

    layer = resolution.request.layer
    assert layer is not None
    done = False

    @functools.wraps(forward)
    def first(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done or _busy.get() or is_observed():
            return forward(*args, **kwargs)
        done = True  # before the probe, so that other threads do not start a second one
        module, given = (None, args) if layer.is_function else (args[0], args[1:])
        call = Call(module, given, kwargs, layer.signature)
        token = _busy.set(True)
        try:
            # A snapshot: the call itself is still to come.
            report = probe(Recorded("", layer, call.snapshot()), resolution)
        except VerificationError:  # the device is broken
            raise
        except Exception as error:
            warn_once(
                f"{resolution.origin} for {resolution.request.place} could not be probed: {error_text(error)}",
            )
            return forward(*args, **kwargs)
        finally:
            _busy.reset(token)
        probe_cache.keep(key, report)  # before anything is decided anew: `_known` asks for it
        _report(resolution, report)
        _take_out(resolution, report)
        mode = Mode.TRAINING if torch.is_grad_enabled() and call.records else Mode.INFERENCE
        if _refusal(report, mode) is None:
            return forward(*args, **kwargs)
        # The kernel is refused for this call already, and the next one is probed, too.
        decided = resolve(layer, device=resolution.request.device, mode=mode)
        return plugin_manager().wrap_forward(decided, serving_forward(decided))(*args, **kwargs)

    return first


def _take_out(resolution: Resolution, report: Any) -> None:
    """Quarantine a kernel for calls that it is incapable of, also where `kernelize` has chosen it; decide anew."""
    layer, implementation = resolution.request.layer, resolution.implementation
    assert layer is not None and implementation is not None
    origin, device = resolution.origin, resolution.request.device
    for mode, out in ((Mode.INFERENCE, None), (Mode.TRAINING, Mode.TRAINING)):
        if reason := _refusal(report, mode):
            quarantine(layer, implementation, kernel=origin, reason=reason, device=device, mode=out, now=True)
            return
    forget()


def _report(resolution: Resolution, report: Any) -> None:
    """Warn, once for each kernel, of probes that failed, and of declarations that are wrong."""
    declares = {name: _declared(resolution, name) for name in ("has_backward", "can_torch_compile")}
    remarks = [f"{name}: {reason}" for name, reason in report.failed.items() if name not in ("gradients", "compile")]
    forward = report.probes.get("forward")
    if forward is not None and forward.ok is None:
        remarks.append(f"whether it is right is not known: {forward.reason}")
    gradients, compiles = report.can("gradients"), report.can("compile")
    if gradients is False and declares["has_backward"]:
        remarks.append(f"it does not declare has_backward = False, and fails in training: {report.failed['gradients']}")
    if gradients and not declares["has_backward"]:
        remarks.append("it declares has_backward = False, and has all gradients")
    if compiles is False and declares["can_torch_compile"]:
        remarks.append(f"it declares can_torch_compile = True, and cannot be traced: {report.failed['compile']}")
    if compiles and not declares["can_torch_compile"]:
        remarks.append("it does not declare can_torch_compile = True, and can be traced")
    if remarks:
        warn_once(f"{resolution.origin} for {resolution.request.place} was probed: {'; '.join(remarks)}")


def _declared(resolution: Resolution, name: str) -> bool:
    """Return a declaration of the kernel that serves; one that declares nothing has a backward."""
    kernel = _kernels.get(_function(resolution.implementation), resolution.implementation)
    return bool(getattr(kernel, name, name == "has_backward"))


def _function(implementation: Any) -> Any:
    return getattr(implementation, "__func__", implementation)


set_module("kernels_plugins", globals())
