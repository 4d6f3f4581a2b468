"""The observers: log records, ranges in profiles, counters for Prometheus."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from kernels_core import Candidate, LayerRequest, PluginLoadError, Resolution, hookimpl, require_type, set_module

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

Forward = Callable[..., Any]

logger = logging.getLogger("kernels_core")

LABELS = ("layer", "device", "origin")
COUNTERS = {
    "resolutions": "Decisions that were put to use, by the origin of the serving kernel.",
    "refusals": "Kernels that were refused on the way to a decision.",
    "failures": "Kernels that could not be loaded.",
    "calls": "Eager calls of decorated layers, by the origin of the kernel that ran.",
}

_making = threading.Lock()
_made: weakref.WeakKeyDictionary[CollectorRegistry, dict[str, Counter]] = weakref.WeakKeyDictionary()


class LogResolutions:
    """A plugin that logs every decision that is put to use, and every refusal on the way.

    The logger is `kernels_core`: decisions have the level `INFO`, refusals `WARNING`. All records have the fields
    `event` (`"resolution"` or `"refusal"`), `layer`, `device`, `mode`, `origin` and `plugin`; refusals also
    `candidate`, `reason` and `cause`, and `exc_info` where the kernel has raised. There `origin` is the origin of the
    kernel that serves instead, and `plugin` the one that offered the candidate.

    Example:
        >>> plugin_manager().register(LogResolutions(), "log")
        'log'
        >>> plugin = plugin_manager().unregister("log")
    """

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Log a decision."""
        request = resolution.request
        fields = {
            "event": "resolution",
            "layer": request.layer_name,
            "device": str(request.device),
            "mode": request.mode_text.replace("inference", "every") if resolution.every_mode else request.mode_text,
            "origin": resolution.origin,
            "plugin": resolution.plugin,
        }
        note = f" ({resolution.note})" if resolution.note else ""
        logger.info("%s: %s%s", resolution.subject, resolution.origin, note, extra=fields)
        for refusal in resolution.refusals:
            more = {
                "event": "refusal",
                "plugin": refusal.plugin,
                "candidate": refusal.candidate.label if refusal.candidate else "",
                "reason": refusal.reason,
                "cause": refusal.cause.name.lower(),
            }
            # An error of our own that was never raised has no lines to show, and its text is that of the refusal.
            raised = refusal.error if refusal.error is not None and refusal.error.__traceback__ is not None else None
            logger.warning("%s: refused %s", resolution.subject, refusal, extra={**fields, **more}, exc_info=raised)


class ProfileRanges:
    """A plugin that puts a range around every eager call of a decorated layer: `SiluAndMul [acme.FastSiluAndMul]`.

    Its name has the layer and the origin of the kernel that runs, or `reference`. `torch.profiler` shows it, and on
    NVIDIA GPUs so do tools that read NVTX, such as Nsight Systems.

    Example:
        >>> plugin_manager().register(ProfileRanges(), "ranges")
        'ranges'
        >>> plugin = plugin_manager().unregister("ranges")
    """

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward]:
        """Put a range around a forward."""
        name = f"{resolution.request.layer_name} [{resolution.origin}]"
        nvtx: Callable[[], AbstractContextManager[object]] = nullcontext
        if resolution.request.device.type == "cuda" and torch.version.cuda:
            literal = name.replace("{", "{{").replace("}", "}}")  # nvtx.range formats its argument
            nvtx = functools.partial(torch.cuda.nvtx.range, literal)

        def decorate(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def ranged(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():  # a kernelized model, compiled: the trace has no calls to name
                    return forward(*args, **kwargs)
                with record_function(name), nvtx():
                    return forward(*args, **kwargs)

            return ranged

        return decorate


class PrometheusCounters:
    """A plugin that counts for Prometheus, with the labels `layer`, `device` and `origin`.

    There are `kernels_core_resolutions_total`, `kernels_core_refusals_total`, `kernels_core_failures_total` and
    `kernels_core_calls_total`. Calls in compiled code are not counted.

    Args:
        registry: The registry of the counters; by default, the one that the client serves.

    Raises:
        ArgumentTypeError: If it is no registry.
        PluginLoadError: If the package prometheus-client is not installed.

    Example:
        >>> from prometheus_client import CollectorRegistry
        >>> plugin_manager().register(PrometheusCounters(CollectorRegistry()), "prometheus")
        'prometheus'
        >>> plugin = plugin_manager().unregister("prometheus")
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Make the counters, or take those that the registry has."""
        try:
            from prometheus_client import REGISTRY, CollectorRegistry, Counter
        except ImportError as error:
            raise PluginLoadError(
                "Counting for Prometheus needs the package prometheus-client, which is not installed: "
                "pip install 'kernels-core[prometheus]'.",
                plugin="prometheus",
            ) from error
        where = REGISTRY if registry is None else registry
        require_type(where, CollectorRegistry, "registry")
        with _making:
            if where not in _made:  # a registry refuses to have a counter twice
                _made[where] = {
                    name: Counter(f"kernels_core_{name}", text, LABELS, registry=where)
                    for name, text in COUNTERS.items()
                }
            self._resolutions, self._refusals, self._failures, self._calls = _made[where].values()

    @hookimpl
    def kernels_resolved(self, resolution: Resolution) -> None:
        """Count a decision and its refusals."""
        layer, device = _place(resolution.request)
        self._resolutions.labels(layer, device, resolution.origin).inc()
        for refusal in resolution.refusals:
            origin = refusal.candidate.label if refusal.candidate else f"plugin {refusal.plugin}"
            self._refusals.labels(layer, device, origin).inc()

    @hookimpl
    def kernels_kernel_failed(self, request: LayerRequest, candidate: Candidate) -> None:
        """Count a kernel that could not be loaded."""
        self._failures.labels(*_place(request), candidate.label).inc()

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward]:
        """Count calls."""
        # Looked up once, not in each call.
        count = self._calls.labels(*_place(resolution.request), resolution.origin).inc

        def decorate(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def counted(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():  # a trace is no call
                    return forward(*args, **kwargs)
                output = forward(*args, **kwargs)
                if output is not NotImplemented:  # else another kernel serves it, and counts it
                    count()
                return output

            return counted

        return decorate


def _place(request: LayerRequest) -> tuple[str, str]:
    return request.layer_name, str(request.device)


set_module("kernels_plugins", globals())
