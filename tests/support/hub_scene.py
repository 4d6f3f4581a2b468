"""Shared by the tests of the Hub loader: a kernel, a layer that it serves, and a look at requests."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from huggingface_hub import constants

from kernels_core import KernelsWarning, Mode, Resolution, resolve, use_kernel_forward_from_hub
from kernels_core.testing import _start_anew
from kernels_plugins import LayerRepository, register_kernel_mapping
from kernels_plugins.hub import kernel as steps
from kernels_plugins.hub import plugin
from kernels_plugins.hub.builds import importing
from kernels_plugins.hub.builds.machine import this_machine
from kernels_plugins.hub.client import answers, download, revision
from kernels_plugins.local_hub.server import LocalHub, Repository

Publish = Callable[..., Repository]

_numbers = itertools.count()
REFERENCE = 2.0


def kernel(factor: float = 3) -> str:
    """Write a kernel layer that multiplies; the reference multiplies by two."""
    return f"import torch\n\n\nclass Scale(torch.nn.Module):\n    def forward(self, x):\n        return x * {factor}\n"


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Clear all that was resolved, loaded and imported, as in a new process; repeat requests without a pause."""
    monkeypatch.setattr(download, "_PAUSES", (0.0,) * len(download._PAUSES))

    def start() -> None:
        _start_anew()
        importing._finder.roots.clear()
        for known in (
            revision._pins,
            revision._listed,
            steps._loaded,
            revision._forgotten,
            plugin._kernels,
        ):
            known.clear()  # type: ignore[attr-defined]
        this_machine.cache_clear()
        answers._started = time.time()  # notes of earlier processes are not for this one

        if listings := sys.modules.get("huggingface_hub._tree_cache"):  # newer clients keep listings in memory
            listings.__dict__["_IN_MEMORY_TREE_CACHE"].clear()
        for name in [name for name in sys.modules if name.startswith("kernel_")]:
            del sys.modules[name]

    start()
    yield start
    start()


@dataclass
class Outcome:
    """The results of three calls of a decorated layer."""

    value: float
    resolution: Resolution
    said: list[str]

    @property
    def why(self) -> str:
        """The only reason why the kernel was refused."""
        (refusal,) = self.resolution.refusals
        return refusal.reason


def call(source: object, times: int = 3) -> Outcome:
    """Decorate a layer, register a source for it, and call it."""
    name = f"Scale{next(_numbers)}"

    @use_kernel_forward_from_hub(name)
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * REFERENCE

    register_kernel_mapping({name: {"cpu": source}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = {Layer()(torch.ones(1)).item() for _ in range(times)}
    said = [str(warning.message) for warning in caught if issubclass(warning.category, KernelsWarning)]
    (value,) = values
    return Outcome(value, resolve(Layer(), device="cpu", mode=Mode.INFERENCE), said)


def served(source: object) -> float:
    """Call, and insist that the kernel serves without a word."""
    outcome = call(source)
    assert outcome.resolution.refusals == () and outcome.said == []
    return outcome.value


def scale(repo_id: str = "acme/kernels", **options: Any) -> LayerRepository:
    """Name the layer of a repository, by default on its main branch."""
    if "version" not in options:
        options.setdefault("revision", "main")
    return LayerRepository(repo_id, layer_name="Scale", **options)


def cached(repository: Repository, variant: str = "torch-universal", commit: str = "") -> Path:
    """Where the files of a variant lie."""
    folder = f"{repository.repo_type}s--{repository.id.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / (commit or repository.head()) / "build" / variant


PROGRAM = """
import json, sys, warnings
import torch
from kernels_core import Mode, resolve, use_kernel_forward_from_hub
from kernels_plugins import LayerRepository, LocalLayerRepository, register_kernel_mapping

answers = []
for number, source in enumerate(sys.argv[1:]):
    @use_kernel_forward_from_hub(f"Scale{number}")
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x * 2.0
    register_kernel_mapping({f"Scale{number}": {"cpu": eval(source)}})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = Layer()(torch.ones(1)).item()
    resolution = resolve(Layer(), device="cpu", mode=Mode.INFERENCE)
    why = "; ".join(refusal.reason for refusal in resolution.refusals)
    answers.append([value, why, dict(resolution.checked), len(said)])
print(json.dumps(answers))
"""


@pytest.fixture
def process(local_hub: LocalHub, tmp_path: Path) -> Callable[..., Any]:
    """Run layers of sources in a new Python; its cache is by default that of this process."""

    def run(
        *sources: object, home: Path = tmp_path / "hub-home", without: tuple[str, ...] = (), **environment: str
    ) -> Any:
        variables = {**os.environ, **local_hub.environment(home), **environment}
        variables = {name: value for name, value in variables.items() if name not in without}
        done = run_python("-c", PROGRAM, *map(repr, sources), environment=variables, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout.splitlines()[-1])
        run.stderr = done.stderr  # type: ignore[attr-defined]
        return answers[0] if len(sources) == 1 else answers

    return run


# Layouts
