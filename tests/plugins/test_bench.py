"""Benchmarks: every candidate at every size, against the reference and a copy, or the reason why not."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from browser import CHROMIUM, browser
from patience import PATIENCE
from torch import nn
from typer.testing import CliRunner

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsError,
    PluginManager,
    find_layer,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import command_line
from kernels_plugins import BenchReport, BenchRow, Choice, ChoiceCell, MeasuredOn, bench, use_kernel_mapping
from kernels_plugins.adoption import plugin as adoption
from kernels_plugins.choice import plugin
from kernels_plugins.choice.bench.sweep import sized
from kernels_plugins.choice.cell import CONTEXTS
from kernels_plugins.choice.choosing import record_calls
from kernels_plugins.choice.machine import machine_of

WIDTH = 8


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    """The layer: slow, and not for 100 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 100:
            raise ValueError("100 | rows")
        time.sleep(0.002)
        return x * self.weight


class Quick(nn.Module):
    """Right, and quick."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Wrong(nn.Module):
    """Quick, and wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Late(nn.Module):
    """Right, and slower than the reference."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)  # by far: on a loaded machine, each sleep is longer
        return self.weight * x


class Other(nn.Module):
    """For other layers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@use_kernel_forward_from_hub("rotate")
def rotate(x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    return x * cos


QUICK, WRONG, LATE, OTHER = (f"{__name__}.{cls.__qualname__}" for cls in (Quick, Wrong, Late, Other))
MAPPING: Any = {"Twice": {"cpu": [Wrong, Quick, Late, Other]}}


@pytest.fixture(autouse=True)
def mapping(isolated_plugins: PluginManager, mapping_plugin: types.ModuleType) -> Iterator[None]:
    """Register the plugins, without the packs, and offer the kernels."""
    isolated_plugins.register(plugin, "choice")
    isolated_plugins.register(adoption, "adopt")
    with use_kernel_mapping(MAPPING):
        yield


# --- Measuring --------------------------------------------------------------------------------------


def test_every_candidate_at_every_size() -> None:
    """Right ones have a time, a ratio and a rate; others a reason; a size that the layer does not take is a row."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Twice()).eval()
    model[0].train()
    report = bench(model, torch.ones(2, WIDTH), rows=[1, 4, 100], layers=["Twice"], seconds=0.01)
    rows = {(row.mode, row.rows, row.candidate): row for row in report.rows}
    assert len(rows) == len(report.rows) == 2 * (2 * 5 + 1)
    for mode in ("inference", "training"):
        for size in (1, 4):
            quick, late, reference = (rows[mode, size, name] for name in (QUICK, LATE, "reference"))
            assert quick.ratio and late.ratio and quick.ratio < 0.9 < 1 < late.ratio and reference.ratio == 1
            assert quick.rate and quick.copy and quick.share == pytest.approx(quick.copy * quick.rate / quick.bytes)
            assert rows[mode, size, WRONG].reason.startswith("wrong: output") and not rows[mode, size, WRONG].ok
            assert "other parameters" in rows[mode, size, OTHER].reason and rows[mode, size, OTHER].ok
        assert rows[mode, 100, "reference"].reason == "not of this size: ValueError: 100 | rows"
    assert not report.ok and "8 at fault" not in report.summary and "4 at fault" in report.summary
    assert (model.training, model[0].training, model[0].weight.grad) == (False, True, None)


def test_bytes() -> None:
    """Inputs, parameters and outputs count once, in training also gradients; an expanded tensor is small."""
    rows = bench(Twice(), torch.ones(2, WIDTH), rows=[4], seconds=0.001).rows
    numbers = {row.mode: row.bytes // 4 for row in rows if row.candidate == QUICK}
    inference = 4 * WIDTH + WIDTH + 4 * WIDTH
    assert numbers == {"inference": inference, "training": inference + 4 * WIDTH + WIDTH}
    given = torch.ones(2, 1).expand(2, WIDTH), torch.ones(2, WIDTH)
    (row,) = bench(rotate, *given, rows=None, modes=["inference"], seconds=0.001).rows
    (compiled,) = bench(rotate, *given, rows=None, modes=["inference"], contexts=["compiled"], seconds=0.001).rows
    assert compiled.seconds is None and "no other candidate can be compiled" in compiled.reason
    assert row.bytes == 4 * (2 + 2 * WIDTH + 2 * WIDTH) and row.candidate == "reference" and row.rows == 2


@pytest.mark.parametrize(
    ("shapes", "rows", "expected"),
    [
        ([(2, 8), (2, 8)], 5, [(5, 8), (5, 8)]),
        ([(6, 8), (8,)], 4, [(4, 8), (8,)]),
        ([(2, 3, 8), (2, 3, 8)], 16, [(1, 16, 8), (1, 16, 8)]),
        ([(4, 1, 8), (1, 8)], 3, [(1, 3, 8), (3, 8)]),
        ([(1, 4, 6, 8), (1, 6, 8)], 64, [(1, 4, 16, 8), (1, 16, 8)]),
        ([(1, 4, 6, 8), (1, 6, 8)], 1, [(1, 4, 1, 8), (1, 1, 8)]),
        ([(8,), (8,)], 9, [(8,), (8,)]),
        ([(3, 0), (3, 0)], 2, [(2, 0), (2, 0)]),
        ([(0, 8), (0, 8)], 2, [(0, 8), (0, 8)]),
    ],
)
def test_sizes(shapes: list[tuple[int, ...]], rows: int, expected: list[tuple[int, ...]]) -> None:
    """The rows change in all inputs that share them; a batch becomes one sequence, and heads stay."""
    inputs = tuple(map(torch.ones, shapes))
    (subject,) = record_calls(rotate, [(inputs, {})], ["inference"])
    assert [tuple(tensor.shape) for tensor in sized(subject, rows).recorded.call.inputs.values()] == expected


def test_an_undecorated_layer_is_adopted_and_given_back() -> None:
    """A layer of PyTorch's own is measured, and is as it was."""
    norm = nn.RMSNorm(WIDTH)
    report = bench(norm, torch.ones(2, WIDTH), rows=[3, 3, 1], modes=["inference"], seconds=0.001)
    assert [(row.layer, row.rows) for row in report.rows] == [("RMSNorm", 3), ("RMSNorm", 1)]
    assert type(norm) is nn.RMSNorm and find_layer(norm) is None and report.machine["device"] == "cpu"


def test_wrong_arguments() -> None:
    """Each is an error that names it, before anything is measured."""
    x = torch.ones(2, WIDTH)
    for given, problem in (
        ({"rows": [0]}, r"rows is \[0\]"),
        ({"rows": []}, "rows is"),
        ({"rows": [1.5]}, "rows is"),
        ({"rows": [True]}, "rows is"),
        ({"layers": "Twice"}, "a list of layer names"),
        ({"layers": ["Thrice"]}, "the model calls Twice, not Thrice"),
        ({"modes": ["test"]}, "modes is"),
        ({"contexts": []}, "contexts is"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"y": 1}, "cannot be run with its inputs"),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=problem):
            bench(Twice(), x, **given)
    with pytest.raises(ArgumentError, match="calls no layer"):
        bench(nn.Identity(), x)
    for wrong in (Twice, len, torch.relu):
        with pytest.raises(ArgumentTypeError, match="a module or a decorated function"):
            bench(wrong, x)


# --- Reports ----------------------------------------------------------------------------------------

ROW = BenchRow("Norm", "inference", "eager", "bfloat16", 4096, 1, "acme.kernels.Norm", 2e-6, 0.5, 16384, 1e-6)
LOST = replace(ROW, candidate="acme | <b>`x`", seconds=None, ratio=None, reason="wrong: a | b\n<script>")
REPORT = BenchReport(
    tuple(
        replace(row, rows=rows, context=context)
        for context in ("eager", "captured")
        for rows in (4096, 1)
        for row in (replace(ROW, candidate="reference", seconds=4e-6, ratio=1.0), ROW, LOST)
    ),
    {"device": "cuda", "model": "H100 <i>", "torch": "2.11"},
)


def test_json() -> None:
    """All values of a row, its rate and share, and the machine; numbers that JSON lacks are text."""
    read = json.loads(REPORT.to_json())
    assert (read["ok"], read["machine"]["model"], len(read["rows"])) == (False, "H100 <i>", 12)
    (first,) = [row for row in read["rows"] if row["candidate"] == ROW.candidate][:1]
    assert (first["rate"], first["share"], first["ok"]) == (16384 / 2e-6, 0.5, True)


def test_tables_fit_a_terminal() -> None:
    """Rows are in order of size, in a table for each context, of at most 80 columns; a reason is shown once in each."""
    text = str(REPORT)
    assert max(map(len, text.splitlines())) <= 80 and text.count("wrong: a | b") == 2
    assert re.findall(r"^ *(\d+)  Norm", text, re.MULTILINE) == ["1", "4096"] * 2
    assert "4 at fault; H100 <i>, torch 2.11" in text


def test_markdown() -> None:
    """Each table has as many cells in each row, and text of others is no markup."""
    text = REPORT.to_markdown()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * (2 + 6) and {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8}
    assert "<script>" not in text.replace(r"\<", "") and r"acme \| \<b\>\`x\`" in text


def test_pictures_and_the_page() -> None:
    """The picture is XML with a bar for each time, and the page has no markup of others."""
    picture = ElementTree.fromstring(REPORT.to_svg())
    bars = [each for each in picture.iter() if each.tag.endswith("rect") and each.get("class") != "back"]
    assert len(bars) == 8 and {bar.get("class") for bar in bars} == {"dim", "green"}
    page = REPORT.to_html()
    assert page.startswith("<!doctype html>") and "<script>" not in page and "H100 &lt;i&gt;" in page
    assert page == REPORT.as_page().to_html() and "kc-bars" in REPORT._repr_html_()
    slow = replace(ROW, candidate="acme.Slow", seconds=8e-4, ratio=200.0)  # beside its bar, others would be nothing
    widths = re.findall(r"width:([\d.]+)%", BenchReport((*REPORT.rows, slow)).to_html())
    assert set(widths) == {"100", "50", "25", "12.5"}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_browser_shows_benchmarks_and_choices(tmp_path: Path) -> None:
    """Both pages load without errors and requests, and nothing is cut on a phone, also beside long names."""
    times = {"reference": 3e-6, "pack:torch:Norm": 2e-6, f"acme.{'Long' * 20}": 1e-6}
    cells = [
        ChoiceCell("Norm", "cpu", context, mode, "float32", 64, bucket, times, {"acme.Wrong": "it is wrong\n  <b>"})
        for context in CONTEXTS
        for mode in ("inference", "training")
        for bucket in (1, 13)
    ]
    choice = Choice((MeasuredOn(machine_of(torch.device("cpu")), tuple(cells)),))
    with browser(tmp_path) as tab:
        for name, text in (("bench", REPORT.to_html()), ("choice", choice.to_html())):
            file = tmp_path / f"{name}.html"
            file.write_text(text, encoding="utf-8")
            assert [tab.faults(file.as_uri(), width) for width in (1280, 400)] == [[], []], name
    assert choice.to_html().count("slower with torch") == 1  # in all layers, modes and contexts


def test_a_plot_is_drawn_or_the_error_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With matplotlib, a picture; without it, or with nothing timed, an error that names the remedy."""
    with pytest.raises(KernelsError, match="nothing to plot"):
        BenchReport((LOST,)).plot(tmp_path / "empty.png")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(KernelsError, match="pip install matplotlib"):
            REPORT.plot(tmp_path / "bench.png")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert REPORT.plot(tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


# --- The command ------------------------------------------------------------------------------------


SCENE = """
import os, time
from layers import Quick, Twice, register_kernel_mapping, torch

class Ends(Quick):
    def forward(self, x): os._exit(3)

calls = []

class Tires(Quick):
    def forward(self, x):
        calls.append(x)
        if len(calls) == 12: os._exit(4)
        return self.weight * x

class Hangs(Quick):
    def forward(self, x): time.sleep(600)

def model():
    register_kernel_mapping({"Twice": {"cpu": [Ends, Hangs, Quick, Tires]}})
    print("a line of the user's code")
    return torch.nn.Sequential(Twice())

def batches(): return [torch.ones(2, 8), {"input": torch.ones(64, 8)}, (torch.ones(64, 8),)]
"""


HANGS = f"{PATIENCE / 150:g}"
"""Seconds until a candidate counts as hung: all of them are waited for."""


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A candidate that ends the process or hangs is a row, the others are measured; it exits with 1."""
    layers = "import time, torch\nfrom torch import nn\nfrom typing import Any\nfrom kernels_core import *\n"
    layers += "from kernels_plugins import *\nWIDTH = 8\n"
    for each in (Twice, Quick):
        layers += inspect.getsource(each)
    (tmp_path / "layers.py").write_text(layers)
    (tmp_path / "scene.py").write_text(SCENE)
    options = (
        f"--mode inference --rows 3 --seconds 0.02 --patience {HANGS} --json --markdown b.md --html b.html --svg b.svg"
    )
    command = [sys.executable, "-m", "kernels_core", "bench", "scene:model", "--inputs", "scene:batches"]
    variables = {**os.environ, "KERNELS_PLUGINS": "-inductor,-liger", "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [*command, *options.split()], capture_output=True, text=True, cwd=tmp_path, env=variables, check=False
    )
    assert ran.returncode == 1, ran.stderr
    found = {row["candidate"]: row for row in json.loads(ran.stdout)["rows"]}
    assert found["layers.Quick"]["ratio"] < 1 and found["layers.Quick"]["rows"] == 3
    assert "exit code 3" in found["scene.Ends"]["reason"] and f"{HANGS} seconds" in found["scene.Hangs"]["reason"]
    assert "exit code 4" in found["scene.Tires"]["reason"]  # after it was found right
    assert "bench: Twice, inference, 3x8: layers.Quick is timed" in ran.stderr
    assert (tmp_path / "b.md").read_text().count("\n| 3 | ") == len(found) == 5
    assert (tmp_path / "b.html").exists() and ElementTree.parse(tmp_path / "b.svg")


def test_the_command_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markdown is printed in place of tables; wrong arguments are errors before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bench_scene.py").write_text("from test_bench import *\ndef batches(): return torch.ones(2, 8)\n")
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def run(arguments: str) -> Any:
        return CliRunner().invoke(command_line(), ["bench", "--in-process", *f"bench_scene:{arguments}".split()])

    ran = run("Twice --inputs bench_scene:batches --rows given --mode inference --seconds 0.001 --markdown -")
    assert ran.exit_code == 1 and ran.stdout.startswith("### Twice, float32, 8 wide: inference, eager\n\n| rows |")
    for arguments, problem in (
        ("Twice --rows 1,two", "--rows is '1,two'"),
        ("Twice --rows 0", "rows is [0]"),
        ("Twice --mode warp", "warp"),
        ("Twice --context warp", "warp"),
        ("Twice --patience 0", "--patience is 0"),
        ("Twice --seconds inf", "seconds is inf"),
        ("Twice --json --markdown -", "both print"),
        ("Twice --png b.png", "pip install matplotlib"),
        ("Twice", "--inputs"),
        ("WIDTH --inputs bench_scene:batches", "is a int, neither a module"),
        ("Twice --inputs bench_scene:batches --layer Norm", "calls Twice, not Norm"),
        ("Twice --inputs bench_scene:batches --device warp", "'warp' cannot be used"),
    ):
        ran = run(arguments)
        assert isinstance(ran.exception, KernelsError) and problem in str(ran.exception), (arguments, ran.exception)
