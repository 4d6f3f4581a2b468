"""The command `kernels-core bisect`: exit codes and output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fresh_process import run_python
from patience import PATIENCE

SCENE = """
import torch
from torch import nn
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping

@use_kernel_forward_from_hub("Step")
class Step(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
    def forward(self, x):
        return x

class FastStep(nn.Module):
    def forward(self, x):
        return x + self.wrong

register_kernel_mapping({"Step": {"cpu": FastStep}})
model = nn.Sequential(Step(0.0), Step(0.5), Step(0.0))

def make():
    return model

def fails():
    raise OSError("no weights")

def loss(model):
    return model(torch.zeros(1)).sum()

def loud(model):
    print("measuring")
    return loss(model)

def broken(model):
    raise ValueError("no data")
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command where the scene is."""
    (tmp_path / "scene.py").write_text(SCENE)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KERNELS_", "DISABLE_"))}
        return run_python("-m", "kernels_core", "bisect", *arguments, environment=kept, folder=tmp_path)

    return call


@pytest.mark.parametrize("model", ["scene:model", "scene:make"])
def test_culprits_are_printed_and_the_code_is_1(run: Run, model: str) -> None:
    """A module or a factory: the table is on standard output, and nothing else."""
    done = run(model, "scene:loss", "--tolerance", "1e-3")
    assert (done.returncode, done.stderr) == (1, "")
    assert "1 of 3 kernels changes the metric" in done.stdout and "scene.FastStep" in done.stdout


def test_json(run: Run) -> None:
    """The JSON has everything, without the output of the metric."""
    done = run("scene:model", "scene:loud", "--tolerance", "1e-3", "--json")
    assert done.returncode == 1
    assert "measuring" in done.stderr
    assert [culprit["path"] for culprit in json.loads(done.stdout)["culprits"]] == ["1"]


def test_within_tolerance_the_code_is_0(run: Run) -> None:
    """No culprit is the answer that was hoped for."""
    done = run("scene:model", "scene:loss", "--tolerance", "0", "--relative", "0.5", "--json")
    assert done.returncode == 1  # half of nothing
    done = run("scene:model", "scene:loss", "--tolerance", "0.6")
    assert done.returncode == 0 and done.stdout.startswith("no culprit: within tolerance")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scene:model", "scene:broken", "--tolerance", "1"), "raised at evaluation 1"),
        (("scene:model", "scene:nothing", "--tolerance", "1"), "Cannot import 'scene:nothing'"),
        (("scene:fails", "scene:loss", "--tolerance", "1"), "makes no model: OSError: no weights"),
        (("scene:model", "scene:loss", "--tolerance", "-1"), "0 or more"),
    ],
)
def test_what_cannot_be_answered_is_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    """A line on standard error says why."""
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_on_a_terminal(run: Run, tmp_path: Path) -> None:
    """While standard error is a terminal, it shows how far the bisection is, and nothing is left of it after."""
    import pty

    slow = "import scene, time\ndef loss(model):\n    time.sleep(0.2)\n    return scene.loss(model)\n"
    (tmp_path / "slow.py").write_text(slow)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kernels_core", "bisect", "scene:model", "slow:loss", "--tolerance", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # as Linux says that the other end was closed
        pass
    finally:
        os.close(ours)
    assert process.wait(PATIENCE) == 1
    assert b"bisect" in shown and b"the model as it is" in shown and re.search(rb"[1-9]/", shown)
    assert process.stdout is not None and b"scene.FastStep" in process.stdout.read()
