"""Choice: candidates that are right race on recorded calls, and the fastest serves such calls, and no others."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    KernelsWarning,
    Mode,
    PluginManager,
    VerificationError,
    kernelize,
    quarantine,
    receipt,
    release,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_core.cli import command_line
from kernels_plugins import Choice, ChoiceCell, MeasuredOn, choosing, use_choice, use_kernel_mapping
from kernels_plugins.choice import plugin
from kernels_plugins.choice.cell import bucket_of, settled
from kernels_plugins.choice.machine import libraries, machine_of
from kernels_plugins.packs import torch_operators

CPU = torch.device("cpu")
WIDTH = 8


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    """The layer; the weight lets autograd record calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= 4:
            time.sleep(0.002)
        return x * self.weight


class Quick(nn.Module):
    """Right, and quick for many rows."""

    can_torch_compile = True

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and len(x) < 4:
            time.sleep(0.002)
        return self.weight * x


class Steady(nn.Module):
    """Right, and never the slowest."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.0005)
        return self.weight * x


class Wrong(nn.Module):
    """The fastest of all, and wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


QUICK, STEADY, WRONG = (f"{__name__}.{cls.__qualname__}" for cls in (Quick, Steady, Wrong))
MAPPING: Any = {"Twice": {"cpu": [Wrong, Quick, Steady]}}


@pytest.fixture(autouse=True)
def choice_plugin(
    isolated_plugins: PluginManager, mapping_plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Register the plugin, without the packs: compiling takes seconds."""
    monkeypatch.delenv("KERNELS_CHOICE", raising=False)
    isolated_plugins.register(plugin, "choice")
    yield
    assert not plugin._open, "the test leaves a choice open"


def cell(times: dict[str, float], rows: int = 1, **more: Any) -> ChoiceCell:
    """Make a cell of the layer above, without measuring."""
    place = {"layer": "Twice", "device": "cpu", "context": "eager", "mode": "inference", "dtype": "float32"}
    return ChoiceCell(**{**place, "width": WIDTH, "bucket": bucket_of(rows), "times": times, **more})


def made(*cells: ChoiceCell, **machine: str) -> Choice:
    """Make a choice for this machine, or one that differs."""
    return Choice((MeasuredOn({**machine_of(CPU), **machine}, cells, libraries()),))


CALLS: list[str] = []


def reporting(name: str) -> type[nn.Module]:
    """Make a right kernel that reports its calls."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(name)
        return x * self.weight

    return type(name, (nn.Module,), {"forward": forward, "__module__": "kernels", "__qualname__": name})


A, B = reporting("A"), reporting("B")
A_FIRST = {"kernels.A": 1.0, "kernels.B": 2.0, "reference": 3.0}
B_FIRST = {"kernels.A": 2.0, "kernels.B": 1.0, "reference": 3.0}
REFERENCE_FIRST = {"kernels.A": 2.0, "kernels.B": 3.0, "reference": 1.0}
BOTH: Any = {"Twice": {"cpu": [A, B]}}


def served(module: nn.Module, *sizes: int) -> list[str]:
    """Return the kernel that serves a call of each number of rows."""
    names = []
    for rows in sizes:
        CALLS.clear()
        with torch.no_grad():
            assert torch.equal(module(torch.ones(rows, WIDTH)), torch.full((rows, WIDTH), 2.0))
        names.append("".join(CALLS) or "reference")
    return names


# --- Cells ------------------------------------------------------------------------------------------


def test_the_reference_wins_ties() -> None:
    """A kernel wins by 2 %, 1 % of a GPU's time, or not at all; those that do not win come after the reference."""
    assert cell({"reference": 1.0, "a": 0.985, "b": 0.9, "c": 2.0}).order == ("b", "reference", "a", "c")
    assert cell({"reference": 1.0, "a": 0.985}).winner == "reference"
    for of_gpu in ({"context": "captured"}, {"busy": True}):
        assert cell({"reference": 1.0, "a": 0.985}, **of_gpu).winner == "a"
        assert cell({"reference": 1.0, "a": 0.995}, **of_gpu).winner == "reference"
    assert cell({"reference": 1.0, "a": 0.85}, context="compiled", busy=True).winner == "reference"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
def test_times_that_are_none_are_refused(wrong: float) -> None:
    """A time that is no positive number makes no cell, nor does a race without the reference."""
    with pytest.raises(ArgumentError, match="Measure again"):
        cell({"reference": 1.0, "a": wrong})
    with pytest.raises(ArgumentError, match="the reference has no time"):
        cell({"a": 1.0})


def test_one_candidate_for_all_cells() -> None:
    """A candidate that is within 2 % of the best everywhere serves everything; else as few do as can."""
    near = cell({"reference": 3.0, "a": 1.01, "b": 1.0})
    assert {order[0] for order in settled([near, cell({"reference": 3.0, "a": 1.0, "b": 2.0}, 9)])} == {"a"}
    slow = cell({"reference": 1.0, "a": 1.2, "b": 1.2}, 9)
    assert [order[0] for order in settled([near, slow, near])] == ["b", "reference", "b"]
    assert settled([]) == []


# --- The file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [lambda: Choice.load(3), lambda: Choice().save(None), lambda: Choice().merged("kernels.choice.json")]
)
def test_wrong_types(call: Any) -> None:
    """They are errors of ours: a number would be read as an open file."""
    with pytest.raises(ArgumentTypeError):
        call()


def test_a_file_keeps_what_is_not_measured_anew(tmp_path: Path) -> None:
    """Saving adds: other machines and calls stay, equal ones are replaced, and reading gives it back."""
    path = tmp_path / "new" / "choice.json"
    old, other = cell(A_FIRST), cell(A_FIRST, 9)
    made(old, other).save(path)
    made(old, model="another machine").save(path)
    made(cell(B_FIRST)).save(path)
    found = Choice.load(path)
    assert [one.machine["model"] == "another machine" for one in found.machines] == [False, True]
    assert [each.winner for each in found.cells_on("cpu")] == ["kernels.B", "kernels.A"]
    assert Choice.load(path) == found and Choice().merged(found) == found


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "machines": 3}', "\x00", "NaN"])
def test_another_file_is_not_overwritten(tmp_path: Path, text: str) -> None:
    """A file of another kind is an error that names it, before anything is measured; it stays as it is."""
    path = tmp_path / "choice.json"
    path.write_text(text)
    for use in (Choice.load, made(cell(A_FIRST)).save, use_choice, choosing):
        with pytest.raises(ArgumentError, match=r"choice\.json"):
            use(path)  # type: ignore[operator]
    assert path.read_text() == text


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@given(st.sampled_from(sorted(vars(cell(A_FIRST)))), _JSON)
def test_a_malformed_cell_is_an_error_of_ours(name: str, value: Any) -> None:
    """Whatever stands in place of a value of a cell: it is read, or refused by an `ArgumentError`."""
    whole = json.loads(made(cell(A_FIRST)).to_json())
    whole["machines"][0]["cells"][0][name] = value
    try:
        (found,) = Choice.read(whole).machines[0].cells
    except ArgumentError:
        return
    assert found.winner in found.times
    assert Choice.read(json.loads(made(found).to_json())).machines[0].cells == (found,)


# --- Use --------------------------------------------------------------------------------------------


def test_the_winner_of_each_shape_serves() -> None:
    """Few rows, more, and most are served by three candidates; numbers between two that agree, by their winner."""
    model = Twice()
    choice = made(cell(REFERENCE_FIRST), cell(A_FIRST, 16), cell(A_FIRST, 256), cell(B_FIRST, 1024))
    with use_kernel_mapping(BOTH):
        assert served(model, 1, 16) == ["A", "A"]
        with use_choice(choice):
            assert served(model, 1, 16, 100, 256, 1024, 16, 1) == ["reference", "A", "A", "A", "B", "A", "reference"]
            with pytest.warns(KernelsWarning, match="2 or more rows of 8 float32, which the choice has no measurement"):
                assert served(model, 2) == ["A"]
        assert served(model, 1) == ["A"]


def test_a_winner_everywhere_costs_nothing() -> None:
    """Where one candidate wins all cells, it is called as without a choice; the reference, too."""
    with use_kernel_mapping(BOTH):
        with use_choice(made(cell(B_FIRST), cell(B_FIRST, 64))):
            assert resolve(Twice, device="cpu", mode=Mode.INFERENCE).implementation is B.forward
            assert served(Twice(), 1, 2, 999) == ["B"] * 3
        with use_choice(made(cell(REFERENCE_FIRST), cell(REFERENCE_FIRST, 64))):
            resolution = resolve(Twice, device="cpu", mode=Mode.INFERENCE)
            assert resolution.implementation is None and "measured faster for this shape" in resolution.explain()
            assert served(Twice(), 1) == ["reference"]


def test_modes_and_models_of_all_kinds() -> None:
    """Training has a choice of its own; kernelized models, copies and compiled code obey it, too."""
    choice = made(
        cell(REFERENCE_FIRST),
        cell(A_FIRST, 64),
        cell(B_FIRST, mode="training"),
        cell({"kernels.C": 1.0, "kernels.A": 2.0, "kernels.B": 2.0, "reference": 3.0}, 64, context="compiled"),
        cell({"kernels.C": 2.0, "kernels.A": 2.0, "kernels.B": 2.0, "reference": 1.0}, context="compiled"),
    )
    graph = type("C", (nn.Module,), {"forward": lambda self, x: (x + x) * 1, "__module__": "kernels"})
    graph.can_torch_compile = True  # type: ignore[attr-defined]
    with use_kernel_mapping({"Twice": {"cpu": [A, B]}}), use_choice(choice):
        CALLS.clear()
        Twice()(torch.ones(64, WIDTH)).sum().backward()
        assert CALLS == ["B"]
        frozen = kernelize(Twice().eval(), device="cpu", mode=Mode.INFERENCE)
        assert served(frozen, 1, 64, 1) == ["reference", "A", "reference"]
        assert served(copy.deepcopy(frozen), 64) == ["A"]
    with use_kernel_mapping({"Twice": {"cpu": [graph]}}), use_choice(choice), torch.no_grad():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(Twice(), backend=counter, fullgraph=True, dynamic=True)
        for rows in (64, 65, 70, 100, 127):
            assert torch.equal(compiled(torch.ones(rows, WIDTH)), torch.full((rows, WIDTH), 2.0))
        assert counter.frame_count == 1
        assert "add" in str(counter.graphs[0].graph) if hasattr(counter, "graphs") else True


def test_a_scope_that_leaves_out_others_leaves_out_choices(isolated_plugins: PluginManager) -> None:
    """In a mapping that does not inherit, no candidate serves that it does not name, whatever was measured."""
    choice = made(cell({"pack:torch:Twice": 1.0, "kernels.A": 2.0, "reference": 3.0}))
    isolated_plugins.register(torch_operators, "torch")
    with use_choice(choice):
        with use_kernel_mapping({"Twice": {"cpu": A}}, inherit_mapping=False):
            assert served(Twice(), 1) == ["A"]
        with use_kernel_mapping({}, inherit_mapping=False):
            assert served(Twice(), 1) == ["reference"]


def test_reasons() -> None:
    """The receipt names the file, the rows of each winner, by how much it wins, and what lost."""
    with use_kernel_mapping(BOTH), use_choice(made(cell(REFERENCE_FIRST), cell(A_FIRST, 64))):
        (row,) = receipt(Twice(), device="cpu", mode=Mode.INFERENCE).rows
    assert row.note == (
        "by the choice: 1 row of 8 float32: reference, measured faster for this shape (lost: kernels.A 2.00, kernels.B "
        "3.00); 64-127 rows of 8 float32: kernels.A, 0.33 of the reference's time (lost: kernels.B 0.67)"
    )


def test_another_machine_and_what_is_new() -> None:
    """Measurements of another machine, and a candidate without one, mean the default order, with a warning."""
    with use_kernel_mapping(BOTH):
        with use_choice(made(cell(B_FIRST), model="another machine")):
            with pytest.warns(KernelsWarning, match="was measured on another machine"):
                assert served(Twice(), 1) == ["A"]
    with use_kernel_mapping({"Twice": {"cpu": [reporting("New"), B]}}), use_choice(made(cell(B_FIRST))):
        with pytest.warns(KernelsWarning, match="has no measurement of it"):
            assert served(Twice(), 1) == ["New"]
    aged = Choice((MeasuredOn(machine_of(CPU), (cell(B_FIRST),), {"python": "2.7"}),))
    with use_kernel_mapping(BOTH):
        with use_choice(aged):
            assert served(Twice(), 1) == ["B"]
        with use_choice(aged, strict=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert served(Twice(), 1) == ["A"]


def test_a_winner_that_cannot_serve() -> None:
    """Code that has changed since, or a quarantine, takes a winner out: the best of those that are left serves."""
    module = Twice()
    changed = cell(B_FIRST, digests={"kernels.B": "another"})
    with use_kernel_mapping(BOTH), use_choice(made(changed)):
        with pytest.warns(KernelsWarning, match="its code has changed since it was measured"):
            assert served(module, 1) == ["A"]
    with use_kernel_mapping(BOTH), use_choice(made(cell(B_FIRST), cell(A_FIRST, 64))):
        chosen = resolve(module, device="cpu", mode=Mode.INFERENCE)
        assert chosen.implementation is not None
        entry = quarantine(chosen.request.layer, chosen.implementation, kernel="B", reason="wrong")  # type: ignore[arg-type]
        with pytest.warns(KernelsWarning, match="quarantine"):
            assert served(module, 1, 64) == ["A", "A"]
        release(entry)


def test_a_relative_path_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its working directory keeps the choice that `KERNELS_CHOICE` named when it started."""
    monkeypatch.chdir(tmp_path)
    made(cell(B_FIRST)).save(tmp_path / "once.json")
    monkeypatch.setenv("KERNELS_CHOICE", "once.json")
    with use_kernel_mapping(BOTH):
        plugin.forget()
        assert served(Twice(), 1) == ["B"]
        (tmp_path / "else").mkdir()
        monkeypatch.chdir(tmp_path / "else")
        plugin.forget()
        assert served(Twice(), 1) == ["B"]
    monkeypatch.undo()
    plugin.forget()


def test_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`KERNELS_CHOICE` names a file; one that cannot be read means the default order, with the reason, or an error."""
    path = tmp_path / "choice.json"
    made(cell(B_FIRST)).save(path)
    monkeypatch.setenv("KERNELS_CHOICE", str(path))
    with use_kernel_mapping(BOTH):
        assert served(Twice(), 1) == ["B"]
        monkeypatch.setenv("KERNELS_CHOICE", str(tmp_path / "none.json"))
        plugin.forget()
        with pytest.warns(KernelsWarning, match=r"none\.json"):
            assert served(Twice(), 1) == ["A"]


def test_a_file_that_is_not_there_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is read from the working directory: the message says which file that is, once."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ArgumentError, match=rf"^'{re.escape(str(tmp_path / 'gone.json'))}' is no file of a choice: No such"
    ):
        Choice.load("gone.json")


def test_a_choice_in_a_configuration_file(tmp_path: Path, configure: Callable[..., Path]) -> None:
    """`choice` names a file in the folder of the configuration file; the variable wins, also where it is empty."""
    made(cell(B_FIRST)).save(tmp_path / "choice.json")
    configure('choice = "choice.json"\n')
    with use_kernel_mapping(BOTH), pytest.MonkeyPatch.context() as patch:
        assert served(Twice(), 1) == ["B"]
        patch.setenv("KERNELS_CHOICE", "")
        plugin.forget()
        assert served(Twice(), 1) == ["A"]


# --- Races ------------------------------------------------------------------------------------------


def test_a_race_is_won_by_the_fastest_that_is_right(tmp_path: Path) -> None:
    """Shapes have their own winners, wrong candidates do not race, and the model is as it was."""
    model = nn.Sequential(Twice())
    state = copy.deepcopy(model.state_dict())
    path = tmp_path / "choice.json"
    random = torch.get_rng_state()
    with use_kernel_mapping(MAPPING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with choosing(path, contexts=["eager"], seconds=0.05) as chosen:
            with torch.no_grad():
                model(torch.ones(2, WIDTH))
                model(torch.ones(64, WIDTH))
            model(torch.ones(64, WIDTH))
        cells = chosen.choice.cells_on("cpu")
        assert [(one.mode, one.rows, one.winner) for one in cells] == [
            ("inference", "2-3", "reference"),
            ("inference", "64-127", QUICK),
            ("training", "64-127", QUICK),
        ]
        assert all(WRONG in one.lost for one in cells) and "wrong" in cells[0].lost[WRONG]
        assert Choice.load(path) == chosen.choice
        with use_choice(path):
            assert resolve(model[0], device="cpu", mode=Mode.TRAINING).origin == QUICK
    assert torch.equal(random, torch.get_rng_state())
    assert model[0].weight.grad is None and not model[0]._forward_pre_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Breaks(nn.Module):
    """Right at first, and raises later."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        CALLS.append("Breaks")
        if len(CALLS) > 9:
            raise OSError("out of order")
        return self.weight * x


def test_a_candidate_that_raises_while_it_is_timed() -> None:
    """It loses with its error as the reason, and the others are measured."""
    CALLS.clear()
    with use_kernel_mapping({"Twice": {"cpu": [Breaks, Quick]}}):
        with choosing(contexts=["eager"], seconds=0.02) as chosen, torch.no_grad():
            Twice()(torch.ones(64, WIDTH))
    (found,) = chosen.choice.cells_on("cpu")
    assert found.winner == QUICK and "OSError: out of order" in found.lost[f"{__name__}.Breaks"]


class Loses(Breaks):
    """Right at first, and loses the device later."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        CALLS.append("Loses")
        if len(CALLS) > 9 and len(x) > 2:
            raise torch.AcceleratorError("CUDA error: the device is lost")
        return self.weight * x


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch has no such error")
def test_a_device_that_is_lost_while_it_is_measured(tmp_path: Path) -> None:
    """The error has the text of the device; earlier cells are kept, and the model is unchanged."""
    CALLS.clear()
    layer, x = Twice(), torch.ones(64, WIDTH)
    with use_kernel_mapping({"Twice": {"cpu": [Loses, Quick]}}):
        with pytest.raises(VerificationError, match=r"(?s)The device failed.*the device is lost.*Start a new process"):
            with choosing(tmp_path / "choice.json", contexts=["eager"], seconds=0.02), torch.no_grad():
                layer(x[:2])
                CALLS.clear()
                layer(x)
    (kept,) = Choice.load(tmp_path / "choice.json").cells_on("cpu")
    assert kept.rows == "2-3" and not layer._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(layer(x), layer.weight * x)


def test_blocks_that_find_nothing() -> None:
    """A block without a call of a layer is an error; one that raises passes that on, and measures nothing."""
    with pytest.raises(ArgumentError, match="has recorded no call"):
        with choosing():
            nn.Linear(2, 2)(torch.ones(2, 2))
    with pytest.raises(ZeroDivisionError):
        with choosing() as chosen:
            Twice()(torch.ones(1, WIDTH))
            1 / 0  # noqa: B018
    assert chosen.choice == Choice()


def test_the_page_and_the_table() -> None:
    """The page shows every cell with its winner; the table has one row for all cells of a kind that one serves."""
    choice = made(cell(A_FIRST, lost={"kernels.<b>": "it says <script>"}), cell(REFERENCE_FIRST, 64))
    page = choice.to_html()
    assert "64-127" in page and "<script>" not in page and "&lt;script&gt;" in page
    more = [cell(A_FIRST, rows) for rows in (2, 4, 1024)]
    choice = made(*choice.cells_on("cpu"), *more, cell(A_FIRST, 1024, dtype="bfloat16", layer="AnotherLayer", width=64))
    assert [line.split() for line in str(choice).splitlines()] == [
        ["layer", "serves", "mode", "context", "rows", "of", "ref."],
        ["AnotherLayer", "A", "inference", "eager", "1024-2047,", "bfloat16", "0.33"],
        ["B", "0.67"],
        ["Twice", "A", "inference", "eager", "1-7", "1024-2047,", "float32", "0.33"],
        ["B", "0.67"],
        ["Twice", "reference", "inference", "eager", "64-127,", "float32", "1.00"],
        ["A", "2.00,", "B", "3.00"],
        ["not", "timed:", "<b>", "of", "Twice:", "it", "says", "<script>"],
        ["6", "measured,", "5", "won", "by", "a", "kernel,", "1", "by", "the", "reference"],
    ]
    assert all(len(line) <= 80 for line in str(choice).splitlines())
    in_turns = [
        cell(A_FIRST if power % 2 else B_FIRST, 2**power, dtype=dtype, width=width)
        for dtype in ("float32", "bfloat16")
        for width in (64, 14336)
        for power in range(13)
    ]
    lines = str(made(*in_turns)).splitlines()
    assert all(len(line) <= 80 for line in lines), lines
    assert any("6 ranges, bfloat16, 14336 wide" in line for line in lines)
    assert "    rows 2-3 8-15 32-63 128-255 512-1023 2048-4095" in lines
    elsewhere = made(cell(B_FIRST), model="another CPU")
    assert "another CPU" in str(choice.merged(elsewhere)) and "another CPU" not in str(choice)


# --- The command ------------------------------------------------------------------------------------

SCENE = """
import os, time, torch
from torch import nn
from kernels_plugins import register_kernel_mapping
from kernels_core import use_kernel_forward_from_hub

@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 2.0))
    def forward(self, x):
        time.sleep(0.002)
        return x * self.weight

def kernel(name, forward):
    return type(name, (nn.Module,), {"forward": forward, "__module__": __name__, "__qualname__": name})

def ends(self, x): os._exit(3)
def hangs(self, x): time.sleep(600)
def right(self, x): return self.weight * x

def model():
    kernels = [kernel("Ends", ends), kernel("Hangs", hangs), kernel("Right", right)]
    register_kernel_mapping({"Twice": {"cpu": kernels}})
    print("a line of the user's code")
    return nn.Sequential(Twice())

def batches(): return [torch.ones(2, 8), {"input": torch.ones(64, 8)}, (torch.ones(64, 8),)]
def fails(): raise OSError("no data")
def plain(): return nn.Identity()
"""


def choose(folder: Path, *arguments: str) -> Any:
    """Run the command in a process of its own, without the pack that compiles."""
    variables = {"KERNELS_PLUGINS": "-inductor,-liger", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "kernels_core", "choose", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **variables}, check=False
    )


HANGS = f"{PATIENCE / 150:g}"
"""Seconds until a candidate counts as hung: all of them are waited for."""


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Candidates that end the process or hang lose, the others are measured, and the file is used by a variable."""
    (tmp_path / "scene.py").write_text(SCENE)
    given_inputs = ("scene:model", "--inputs", "scene:batches", "--mode", "inference", "--context", "eager")
    ran = choose(tmp_path, *given_inputs, "--seconds", "0.02", "--patience", HANGS, "--html", "c.html", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads((tmp_path / "kernels.choice.json").read_text())
    cells = Choice.load(tmp_path / "kernels.choice.json").cells_on("cpu")
    assert [(one.rows, one.winner) for one in cells] == [("2-3", "scene.Right"), ("64-127", "scene.Right")]
    assert "exit code 3" in cells[0].lost["scene.Ends"] and f"{HANGS} seconds" in cells[0].lost["scene.Hangs"]
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")


def test_wrong_arguments_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is an error that names it, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "chosen_scene.py").write_text(SCENE)
    (tmp_path / "other.json").write_text("{}")
    for arguments, problem in (
        ("model --output other.json", "no file of a choice"),
        ("model --inputs chosen_scene:fails", "no data"),
        ("plain --inputs chosen_scene:batches", "calls no layer"),
        ("batches", "is a list, neither a module"),
        ("model", "--inputs"),
        ("model --context warp", "warp"),
        ("model --seconds 0", "seconds is 0"),
        ("model --patience 0", "above 0"),
    ):
        ran = CliRunner().invoke(command_line(), ["choose", "--in-process", *f"chosen_scene:{arguments}".split()])
        assert isinstance(ran.exception, ArgumentError) and problem in str(ran.exception)
    assert not (tmp_path / "kernels.choice.json").exists()
