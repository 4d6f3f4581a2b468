"""What is paid once: the first call of a layer, and a change of mappings. A report, without limits."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row
from torch import nn

from kernels_core import Mode, forget, resolve, use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping

LAYERS = 200
REPEATS = 7


class Kernel(nn.Module):
    """What serves."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


def run() -> Iterator[Row]:
    """Measure decorating, first calls, and changes of mappings with many warm layers."""
    x = torch.ones(2)
    resolve("bench_discovery", device="cpu", mode=Mode.INFERENCE)  # plugins are found before
    names = [f"bench_cold_{i}" for i in range(LAYERS)]
    classes = [type("L", (nn.Module,), {"forward": _reference()}) for _ in names]
    decorating = _time(
        lambda: [use_kernel_forward_from_hub(n)(c) for n, c in zip(names, classes, strict=True)], repeats=1
    )
    yield Row("cold", "decorating one class", decorating / LAYERS, "us")

    layers = [cls() for cls in classes]
    register_kernel_mapping({name: {"cpu": Kernel} for name in names})
    try:
        yield Row("cold", f"first call, mean of {LAYERS} layers", _time(lambda: _call(layers, x), 1) / LAYERS, "us")
        yield Row("cold", f"forget() with {LAYERS} warm layers", _time(forget), "us")
        change = _time(lambda: register_kernel_mapping({"bench_cold_0": {"cpu": Kernel}}))
        yield Row("cold", f"register_kernel_mapping with {LAYERS} warm layers", change, "us")
        yield Row("cold", "the same, for each warm layer", change / LAYERS, "us")
        by_name = _time(lambda: [resolve(name, device="cpu", mode=Mode.INFERENCE) for name in names])
        yield Row("cold", "resolve() by name", by_name / LAYERS, "us")
    finally:
        register_kernel_mapping({}, inherit_mapping=False)


def _reference() -> Callable[..., Any]:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    return forward


def _call(layers: list[nn.Module], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


def _time(action: Callable[[], object], repeats: int = REPEATS) -> float:
    taken = []
    for _ in range(repeats):
        gc.collect()
        before = time.perf_counter()
        action()
        taken.append((time.perf_counter() - before) * 1e6)
    return statistics.median(taken)
