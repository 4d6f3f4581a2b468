"""What an open canary costs a step of training of a Llama-style block: kernels of the demo, from its folder."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import Row

from kernels_core import KernelsWarning, Scope, plugin_manager
from kernels_plugins import LocalLayerRepository, canary, use_kernel_mapping
from kernels_plugins.canary import plugin as canary_plugin
from kernels_plugins.demo.block import Block
from kernels_plugins.demo.bundle import write_bundle
from kernels_plugins.demo.measure import LAYERS, SIZES
from kernels_plugins.hub import plugin as hub_plugin

FOLDER = tempfile.TemporaryDirectory(prefix="benchmark-canary-")
STEPS = 100
EVERY = 100
LIMIT = 1.03


def kernels_of_demo(*, updates: bool = False) -> tuple[Callable[[], None], str, Scope]:
    """Return a step of the demo's block, its device, and the scope of the demo's kernels.

    A step is forward and backward; with `updates`, of AdamW, too, whose learning rate is zero: numbers stay the same.
    """
    for name, plugin in {"canary": canary_plugin, "hub": hub_plugin}.items():
        if name not in plugin_manager().plugins():  # a checkout that is not installed has no entry points
            plugin_manager().register(plugin, name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size, batch = SIZES[device]
    torch.manual_seed(0)
    block = Block(**size).to(device, dtype)
    x = torch.randn(batch, size["length"], size["hidden"], device=device, dtype=dtype, requires_grad=True)
    repository = write_bundle(Path(FOLDER.name, "hub")) / "kernels-demo" / "llama-layers"
    mapping = {name: {device: LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}

    optimizer = torch.optim.AdamW(block.parameters(), lr=0.0, fused=True)

    def step() -> None:
        block(x).float().sum().backward()
        if updates:
            optimizer.step()
            optimizer.zero_grad()

    return step, device, use_kernel_mapping(mapping)


def run() -> Iterator[Row]:
    """Measure on a CUDA device where there is one, else on the CPU, where no limit counts."""
    step, device, scope = kernels_of_demo()
    with scope, warnings.catch_warnings():
        warnings.simplefilter("error", KernelsWarning)
        for _ in range(3):
            step()
        off: list[float] = []
        on: list[float] = []
        for _ in range(3 if device == "cuda" else 1):
            off.append(seconds(step, device))
            with canary(first=0, every=EVERY, action="raise", outliers=False):
                on.append(seconds(step, device))
        with canary(first=10**9, every=0, action="raise", outliers=False):
            each = seconds(step, device, steps=10)
    what = f"Llama-style block, forward and backward ({device})"
    plain = statistics.median(off) * 1e3
    yield Row(
        "canary",
        f"{what}, canary on 1 call in {EVERY}",
        statistics.median(on) * 1e3,
        "ms",
        "no canary",
        plain,
        LIMIT if device == "cuda" else None,
        judge="ratio",
    )
    yield Row("canary", f"{what}, canary on each call", each * 1e3, "ms", "no canary", plain)


def seconds(step: Callable[[], None], device: str, steps: int = STEPS) -> float:
    """Return the mean time of a step: a canary's cost is in few of them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps
