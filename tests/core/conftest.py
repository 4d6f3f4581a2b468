"""Shared by the tests of the core: isolated plugins, layers and kernels made to order, subprocesses."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kernels_core import use_kernel_forward_from_hub

REFERENCE = 1.0
"""What the reference of `make_layer` adds."""


@pytest.fixture(autouse=True)
def _isolated(mapping_plugin: object) -> None:
    """Run every test of the core with the plugins `core` and `mapping` alone."""


@pytest.fixture
def make_layer() -> Callable[..., type[nn.Module]]:
    """Make decorated classes whose reference adds one."""

    def make(name: str = "Add", **options: Any) -> type[nn.Module]:
        @use_kernel_forward_from_hub(name, **options)
        class Add(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + REFERENCE

        return Add

    return make


@pytest.fixture
def make_kernel() -> Callable[..., type[nn.Module]]:
    """Make kernel layers that add a number of their own."""

    def make(added: float, **declarations: Any) -> type[nn.Module]:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return x + added

        return type(f"Add{added:g}", (nn.Module,), {"forward": forward, **declarations})

    return make


@pytest.fixture
def compiled() -> Iterator[Callable[..., tuple[Callable[..., Any], CompileCounterWithBackend]]]:
    """Compile without graph breaks, and count graphs."""
    torch._dynamo.reset()

    def make(target: Callable[..., Any], backend: str = "eager") -> tuple[Callable[..., Any], Any]:
        counter = CompileCounterWithBackend(backend)
        return torch.compile(target, backend=counter, fullgraph=True), counter

    yield make
    torch._dynamo.reset()


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a new interpreter that sees the distributions under `tmp_path / "site"`."""

    def run(code: str, environment: Mapping[str, str] | None = None, *, check: bool = True) -> Any:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KERNELS_", "DISABLE_KERNEL_MAPPING", "PYTHONPATH", "PYTHONWARNINGS"))
        }
        variables = {**clean, "PYTHONPATH": str(tmp_path / "site"), **(environment or {})}
        done = run_python("-c", textwrap.dedent(code), environment=variables, folder=tmp_path)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def distribution(tmp_path: Path) -> Callable[..., Path]:
    """Install real distributions, as an installer lays them out, where `python` sees them."""

    def install(name: str, entry_points: Mapping[str, str], modules: Mapping[str, str]) -> Path:
        site = tmp_path / "site"
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{plugin} = {target}" for plugin, target in entry_points.items()]
        (info / "entry_points.txt").write_text("[kernels_core]\n" + "\n".join(lines) + "\n")
        (info / "RECORD").write_text("")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(textwrap.dedent(source))
        return site

    return install
