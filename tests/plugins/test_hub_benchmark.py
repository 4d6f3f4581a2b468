"""`kernels-core benchmark`: scripts of a publisher run only by consent, checked, and in a process of their own."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run, run_here
from hub_scene import Publish, cached, kernel, new_process

from kernels_core import LayerRequest, hookimpl, plugin_manager
from kernels_plugins.hub.benchmark import command, runner
from kernels_plugins.hub.benchmark.scripts import Scripts
from kernels_plugins.local_hub.server import LocalHub, Repository

pytest_plugins = ["kernels_plugins.hub.testing"]

SCRIPT = """
import os, torch
from kernels.benchmark import Benchmark

assert os.path.isdir("benchmarks"), os.getcwd()
print("a script prints")

class Scales(Benchmark):
    seed = 42

    def setup(self):
        self.x = torch.randn(64, device=self.device)
        self.layer = self.kernel.layers.Scale()

    def benchmark_right(self):
        self.out = self.layer(self.x)

    def verify_right(self):
        return self.x * 3

    def benchmark_wrong(self):
        self.out = self.layer(self.x)

    def verify_wrong(self):
        return self.x * 4

    def setup_alone(self):
        self.x = torch.ones(4)

    def benchmark_alone(self):
        self.x.add_(1)

    def benchmark_raises(self):
        raise ValueError("no tensors\\x1b[2J")
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, new_process: object) -> Run:
    """Run the command on few iterations."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_here, capfd, "benchmark", "--iterations", "3", "--warmup", "1")


@pytest.fixture
def publish(kernel_repository: Publish) -> Callable[..., Repository]:
    """Publish a kernel with files in its folder `benchmarks`."""

    def publish(repo_id: str = "acme/kernels", trusted: bool = True, **scripts: str) -> Repository:
        repository = kernel_repository(repo_id, kernel(3), trusted=trusted)
        files = {f"benchmarks/{name}.py": text for name, text in scripts.items()}
        repository.commit({**repository.files(), **files})
        repository.branch("v1")
        return repository

    return publish


def test_without_consent_nothing_runs(run: Run, publish: Callable[..., Repository], tmp_path: Path) -> None:
    """The refusal says whose programs they are, where to read them, and how to allow them; none is run."""
    publish(benchmark="import os; os.mkdir('ran')", benchmark_more="", helper="")
    refused = run("acme/kernels")
    assert (refused.code, refused.out) == (2, "")
    assert "run with your rights" in refused.err and "add --trust-code" in refused.err
    places = [Path(line.strip()) for line in refused.err.splitlines() if line.startswith("  ")]
    assert [place.name for place in places] == ["benchmark.py", "benchmark_more.py"]
    assert places[0].read_text() == "import os; os.mkdir('ran')"
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.slow
def test_workloads_are_measured_and_compared(run: Run, publish: Callable[..., Repository], tmp_path: Path) -> None:
    """Each workload has a result: right, wrong, not compared, or that it raises; files of the folder are no modules."""
    repository = publish(benchmark=SCRIPT, notes="this is no Python")
    (tmp_path / "statistics.py").write_text("raise SystemExit('a file of the working directory ran')")
    ran = run("acme/kernels", "--version", "1", "--trust-code", "--json")
    assert ran.code == 1 and "a script prints" in ran.err
    rows = {row["workload"]: row for row in ran.json["results"]}
    assert list(rows) == ["Scales.alone", "Scales.raises", "Scales.right", "Scales.wrong"]
    assert [rows[f"Scales.{name}"].get("verified") for name in ("alone", "right", "wrong")] == [None, True, False]
    assert rows["Scales.raises"]["error"] == "ValueError: no tensors\x1b[2J"
    times = rows["Scales.right"]["timingResults"]
    assert 0 < times["min_ms"] <= times["mean_ms"] <= times["max_ms"] and times["iterations"] == 3
    assert rows["Scales.right"]["reference"]["mean_ms"] > 0
    assert ran.json["kernelCommitSha"] == repository.head("v1") and ran.json["ok"] is False


@pytest.mark.slow
def test_a_process_that_ends_or_hangs(run: Run, publish: Callable[..., Repository]) -> None:
    """Results until the end are shown, with the reason; a script that never ends is ended."""
    repository = publish(benchmark=SCRIPT.replace('raise ValueError("no tensors\\x1b[2J")', "os._exit(3)"))
    assert run("acme/kernels").code == 2
    ran = run(str(cached(repository, commit=repository.head("v1")).parents[1]), "--trust-code")  # a folder
    assert ran.code == 2 and "Scales.alone" in ran.out and "ended with exit code 3" in ran.err
    publish("acme/slow", benchmark="import time; time.sleep(3600)")
    slow = run("acme/slow", "--trust-code", "--timeout", "1")
    assert slow.code == 2 and "ended after 1 seconds: give them more with --timeout" in slow.err


@pytest.mark.parametrize("consent", [(), ("--trust-code",)])
def test_consent_replaces_no_other_check(
    run: Run, publish: Callable[..., Repository], local_hub: LocalHub, consent: tuple[str, ...]
) -> None:
    """Refused as ever: a publisher without trust, a policy, other bytes, a script that no commit has, no scripts."""
    publish("stranger/kernels", trusted=False, benchmark=SCRIPT)
    assert "is not a trusted publisher" in run("stranger/kernels", *consent).err
    publish("acme/bare")
    assert "comes without benchmarks" in run("acme/bare", *consent).err
    publish("acme/damaged", benchmark=SCRIPT)
    local_hub.fail("benchmarks/benchmark.py", flip=10)
    assert "other bytes" in run("acme/damaged", *consent).err
    planted = publish("acme/planted", benchmark=SCRIPT)
    assert "--trust-code" in run("acme/planted").err  # they are downloaded
    folder = cached(planted, commit=planted.head("v1")).parents[1]
    (folder / "benchmarks" / "benchmark_planted.py").write_text("raise SystemExit('it ran')")
    refused = run("acme/planted", *consent)
    assert refused.code == 2 and "benchmark_planted.py is not on the Hub" in refused.err and "it ran" not in refused.err

    class Policy:
        @hookimpl
        def kernels_authorize(self, request: LayerRequest, candidate: object) -> str:
            return "nothing runs here"

    publish("acme/other", benchmark=SCRIPT)
    plugin_manager().register(Policy(), "policy")
    try:
        refused = run("acme/other", *consent)
    finally:
        plugin_manager().unregister("policy")
    assert refused.code == 2 and "nothing runs here" in refused.err


def test_a_script_that_changed_since_it_was_checked_does_not_run(tmp_path: Path) -> None:
    """The bytes that run are those that were checked."""
    path = tmp_path / "benchmark.py"
    path.write_text("raise SystemExit")
    with pytest.raises(ValueError, match="was changed since it was checked"):
        runner.find_classes(path, "0" * 64, runner.Benchmark)


def test_scripts_run_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where `kernels` is not installed, its base class is found under its name; the table has a row a workload."""
    for name in ("kernels", "kernels.benchmark"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert runner.base_class() is runner.Benchmark
    namespace: dict[str, Any] = {"__name__": runner._MODULE}
    exec(SCRIPT.replace("assert os", "os"), namespace)
    layers = type("Kernel", (), {"layers": type("Layers", (), {"Scale": lambda: lambda x: x * 3})})
    results = list(runner.run_class(namespace["Scales"], layers, "cpu", 2, 0))
    assert torch.initial_seed() == 42
    capsys.readouterr()
    command._show(results, Scripts("acme/kernels@c0ffee", "acme/kernels", "c0ffee", tmp_path, {}), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["workload", "mean", "reference", "speed-up", "right"]
    assert [line.split("  ")[-1].strip() for line in lines[1:6] if "Scales" in line] == [
        "not compared",
        "failed",
        "yes",
        "NO",
    ]
    assert r"no tensors\x1b[2J" in lines[3] and max(map(len, lines[:6])) <= 80


@pytest.mark.parametrize(
    "arguments", [["--iterations", "0"], ["--timeout", "0"], ["--version", "1", "--revision", "x"]]
)
def test_wrong_arguments(run: Run, publish: Callable[..., Repository], arguments: list[str]) -> None:
    """A number that makes no sense, or two ways to name a commit, is exit code 2 and a message."""
    publish(benchmark=SCRIPT)
    ran = run("acme/kernels", *arguments)
    assert ran.code == 2 and ran.out == "" and "Traceback" not in ran.err
