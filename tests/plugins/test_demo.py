"""The demo, from the command line, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python

from kernels_plugins.demo import measure
from kernels_plugins.demo.block import Block
from kernels_plugins.demo.bundle import write_bundle

LAYERS = {"RMSNorm", "RotaryEmbedding", "SiluAndMul", "GeluAndMul"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # a setting of the user's that the demo must not mind
    command = ("-m", "kernels_core", "demo", "--device", "cpu", *arguments)
    return run_python(*command, environment=environment, folder=Path.cwd())


def repository_with(tmp_path: Path, spoil: dict[str, bytes]) -> Path:
    """Write the bundled repository and append bytes to some files of its build for the CPU."""
    copy = write_bundle(tmp_path / "served")
    for name, more in spoil.items():
        with (copy / measure.REPOSITORY / "build" / "torch-cpu" / name).open("ab") as file:
            file.write(more)
    return copy


@pytest.mark.slow
def test_demo_serves_every_layer(tmp_path: Path) -> None:
    """Kernels from the Hub serve all four layers and are right; a model is measured; a warm cache saves requests."""
    page = tmp_path / "demo.html"
    done = run("--json", "--keep", str(tmp_path / "kept"), "--html", str(page), "--seconds", "0.01")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    rows = result["rows"]
    assert {row["layer"] for row in rows} - {"all 4"} == LAYERS
    assert all(row["served"] and row["is_right"] for row in rows)
    assert all(row["implementation"].startswith(f"{measure.REPOSITORY}@") for row in rows)
    assert 0 < result["requests"]["warm"] < result["requests"]["cold"]
    assert list((tmp_path / "kept" / "hub").glob("*kernels-demo*"))
    steps = [step["name"] for step in result["steps"]]
    assert steps[1:3] == ["one token", "training step"] and len(steps) == 3 + result["compiler"]
    assert all(step["plain_ms"] > 0 and step["chosen_ms"] > 0 and step["difference"] <= 1 for step in result["steps"])
    (machine,) = result["choice"]["machines"]
    timed = {(cell["layer"], cell["mode"]): {*cell["times"]} for cell in machine["cells"]}
    if "GPT-2" in result["model"]:  # transformers is installed
        assert {"reference", "pack:inductor:GeluTanh"} < timed["GeluTanh", "training"]
    else:
        assert any(measure.REPOSITORY in name for name in timed["RMSNorm", "inference"])
    assert result["receipt"] and "demo: training step" in done.stderr
    assert page.read_text().startswith("<!doctype html>")


def test_demo_refuses_changed_bytes(tmp_path: Path) -> None:
    """One byte that its publisher did not sign off: no kernel serves, the reason is printed, the exit code is 1."""
    served = repository_with(tmp_path, {"layers.py": b"#"})
    done = run("--repository", str(served))
    assert done.returncode == 1, done.stderr
    assert "layers.py" in done.stdout
    assert "refused LayerRepository" in done.stdout
    assert "NOT all served" in done.stdout


def test_demo_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is served but wrong is distinguished from one that is right."""

    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x[..., : x.shape[-1] // 2])

    monkeypatch.setattr(measure, "mapping", lambda device: {"SiluAndMul": {"cpu": Wrong}})
    result = measure.measure(torch.device("cpu"), torch.float32)
    rows = result["rows"]
    (row,) = [row for row in rows if row["layer"] == "SiluAndMul"]
    assert row["served"]
    assert not row["is_right"]
    assert not any(row["served"] for row in rows if row["layer"] == "RMSNorm")
    assert "steps" not in result


def test_demo_refuses_a_device_that_is_not_there() -> None:
    """A wrong device is a message and exit code 2, before anything is started."""
    done = run("--device", "toaster")
    assert done.returncode == 2
    assert done.stderr.startswith("error: The device 'toaster' cannot be used here")
    assert done.stdout == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_uses_every_layer_and_is_causal(dtype: torch.dtype) -> None:
    """The demo's block has all four layers, and no position sees a later one."""
    torch.manual_seed(0)
    block = Block(hidden=32, heads=4, inner=48, length=16).to(dtype)
    names = {type(module).__name__ for module in block.modules()}
    assert names >= LAYERS
    x = torch.randn(2, 16, 32, dtype=dtype)
    changed = x.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(block(x)[:, :9], block(changed)[:, :9])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_demo_refuses_a_time_that_is_none(seconds: str) -> None:
    """A time that cannot be measured for is a message and exit code 2, before anything is started."""
    done = run("--seconds", seconds)
    assert done.returncode == 2 and "give the seconds to time each step for" in done.stderr
