"""Decisions and calls as counters for Prometheus."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kernels_core import Candidate, LayerRequest, PluginLoadError, Resolution, hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

Forward = Callable[..., Any]

LABELS = ("layer", "device", "origin")
COUNTERS = {
    "resolutions": "Decisions that were put to use, by the origin of the serving kernel.",
    "refusals": "Kernels that were refused on the way to a decision.",
    "failures": "Kernels that could not be loaded.",
    "calls": "Eager calls of decorated layers, by the origin of the kernel that ran.",
}

_making = threading.Lock()
_made: weakref.WeakKeyDictionary[CollectorRegistry, dict[str, Counter]] = weakref.WeakKeyDictionary()


class PrometheusCounters:
    """A plugin that counts for Prometheus, with the labels `layer`, `device` and `origin`.

    There are `kernels_core_resolutions_total`, `kernels_core_refusals_total`, `kernels_core_failures_total` and
    `kernels_core_calls_total`. Calls in compiled code are not counted.

    Args:
        registry: The registry of the counters; by default, the one that the client serves.

    Raises:
        PluginLoadError: If the package prometheus-client is not installed.

    Example:
        >>> from prometheus_client import CollectorRegistry
        >>> plugin_manager().register(PrometheusCounters(CollectorRegistry()), "prometheus")
        'prometheus'
        >>> plugin = plugin_manager().unregister("prometheus")
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Make the counters, or take those that the registry has."""
        counters = _counters(registry)
        self._resolutions, self._refusals, self._failures, self._calls = (counters[name] for name in COUNTERS)

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
        count = self._calls.labels(*_place(resolution.request), resolution.origin).inc

        def decorate(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def counted(*args: Any, **kwargs: Any) -> Any:
                if not torch.compiler.is_compiling():
                    count()
                return forward(*args, **kwargs)

            return counted

        return decorate


def _place(request: LayerRequest) -> tuple[str, str]:
    return request.layer_name, str(request.device)


def _counters(registry: CollectorRegistry | None) -> dict[str, Counter]:
    """Return the counters of a registry, which refuses to have them twice."""
    try:
        from prometheus_client import REGISTRY, Counter
    except ImportError as error:
        raise PluginLoadError(
            "Counting for Prometheus needs the package prometheus-client, which is not installed: "
            "pip install 'kernels-core[prometheus]'.",
            plugin="prometheus",
        ) from error
    where = REGISTRY if registry is None else registry
    with _making:
        if where not in _made:
            _made[where] = {
                name: Counter(f"kernels_core_{name}", text, LABELS, registry=where) for name, text in COUNTERS.items()
            }
        return _made[where]
