"""What it costs to enter and leave `use_kernel_mapping`, with layers mapped and decorated outside."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from measure import Row, compare
from torch import nn

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping, use_kernel_mapping

LIMIT_US = 20.0
OUTSIDE = 200
NEW, REUSED, ENTER = "with use_kernel_mapping(m): pass", "with scope: pass", "with use_kernel_mapping(m): layer(x)"


class Kernel(nn.Module):
    """What serves."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


class Reference(nn.Module):
    """What is decorated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x


PEER_PROGRAM = """
import json, statistics, sys, timeit
from pathlib import Path
import kernels
from kernels import LocalLayerRepository, register_kernel_mapping, use_kernel_mapping
source = LocalLayerRepository(repo_path=Path("nowhere"), layer_name="Kernel")
mapping = lambda n: {f"bench_{i}": {"cpu": source} for i in range(n)}
answers = {"version": kernels.__version__}
for outside, inside in json.loads(sys.argv[1]):
    register_kernel_mapping(mapping(outside), inherit_mapping=False)
    m = mapping(inside)
    scope = use_kernel_mapping(m)
    names = {"use_kernel_mapping": use_kernel_mapping, "m": m, "scope": scope}
    for source_code in json.loads(sys.argv[2]):
        timer = timeit.Timer(source_code, globals=names)
        n = max(1, int(0.01 / max(timer.timeit(1), 1e-7)))
        answers[f"{outside} {inside} {source_code}"] = statistics.median(timer.repeat(15, n)) / n * 1e6
print(json.dumps(answers))
"""


def run() -> Iterator[Row]:
    """Measure our scopes, and those of Hugging Face `kernels` where installed."""
    sizes = [(OUTSIDE, 1), (0, 1), (2000, 1), (OUTSIDE, 10), (OUTSIDE, 100), (OUTSIDE, 1000)]
    peer, theirs = _peer(sizes)
    x = torch.ones(2)
    layers = [use_kernel_forward_from_hub(f"bench_{i}")(type("L", (Reference,), {}))() for i in range(OUTSIDE)]
    try:
        for outside, inside in sizes:
            register_kernel_mapping(_mapping(outside), inherit_mapping=False)
            for layer in layers:
                layer(x)  # warm: there is something to lose
            mapping = _mapping(inside)
            names: dict[str, Any] = {"use_kernel_mapping": use_kernel_mapping, "m": mapping, "layer": layers[0], "x": x}
            names["scope"] = use_kernel_mapping(mapping)
            times = compare(
                {source: (source, names) for source in (NEW, REUSED, ENTER)}, rounds=20, repeats=3 if inside < 99 else 1
            )
            limited = (outside, inside) == (OUTSIDE, 1)
            for label, source in {"new object": NEW, "reused object": REUSED}.items():
                yield Row(
                    "scope",
                    f"{label}: {inside} inside, {outside} outside",
                    times[source] / 1e3,
                    "us",
                    peer,
                    theirs.get(f"{outside} {inside} {source}"),
                    LIMIT_US if limited else None,
                )
            if limited:
                yield Row("scope", "new object and a first call inside of it", times[ENTER] / 1e3, "us")
    finally:
        register_kernel_mapping({}, inherit_mapping=False)


def _mapping(size: int) -> dict[str, dict[str, type[nn.Module]]]:
    return {f"bench_{i}": {"cpu": Kernel} for i in range(size)}


def _peer(sizes: list[tuple[int, int]]) -> tuple[str, dict[str, Any]]:
    """Run the peer's scopes in an interpreter of their own; nothing if it is not installed."""
    if importlib.util.find_spec("kernels") is None:
        return "", {}
    command = [sys.executable, "-W", "ignore", "-c", PEER_PROGRAM, json.dumps(sizes), json.dumps([NEW, REUSED])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        print(f"no peer: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return "", {}
    answers = json.loads(done.stdout.splitlines()[-1])
    return f"Hugging Face kernels {answers['version']}", answers
