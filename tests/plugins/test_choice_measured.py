"""Measuring changes nothing, keeps nothing, and is done with the calls as they were made."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernels_core import ArgumentError, KernelsWarning, use_kernel_forward_from_hub
from kernels_plugins import Choice, choosing, use_choice, use_kernel_mapping
from kernels_plugins.choice import timing
from kernels_plugins.choice.cell import REFERENCE
from kernels_plugins.choice.race import _Race

from .test_choice import (
    A_FIRST,
    WIDTH,
    cell,
    choice_plugin,  # noqa: F401 - for all tests here
    made,
)
from .test_choice_served import kernel


@use_kernel_forward_from_hub("InPlace")
class InPlace(nn.Module):
    """A layer that changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.weight)


@use_kernel_forward_from_hub("Counting")
class Counting(nn.BatchNorm1d):
    """A layer with buffers that each call in training changes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


@use_kernel_forward_from_hub("Narrow")
class Narrow(nn.Module):
    """A layer that only runs under autocast: its input has another dtype than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


@use_kernel_forward_from_hub("weighed")
def weighed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Take a weight as an argument, as losses do."""
    return x * weight


@use_kernel_forward_from_hub("drops")
def drops(x: torch.Tensor) -> torch.Tensor:
    """Draw random numbers."""
    return functional.dropout(x, 0.5)


def measured(name: str, candidate: Any, *calls: Any) -> Choice:
    """Choose for a layer with one candidate."""
    with use_kernel_mapping({name: {"cpu": candidate}}), choosing(contexts=["eager"], seconds=0.001) as chosen:
        for call in calls:
            call()
    return chosen.choice


def test_layers_that_change_their_input() -> None:
    """They are measured on fresh copies, with and without gradients."""
    values: list[float] = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        values.append(float(x.detach().abs().max()))
        return x.mul_(self.weight)

    module, x = InPlace(), torch.ones(4, WIDTH)
    with torch.no_grad():
        choice = measured("InPlace", kernel("K", forward), lambda: module(x))
    trained = measured("InPlace", kernel("K", forward), lambda: module(x * 1))
    assert ["kernels.K" in one.times for one in (*choice.cells_on("cpu"), *trained.cells_on("cpu"))] == [True, True]
    assert max(values) < 10 and torch.equal(x, torch.full((4, WIDTH), 3.0))


def test_layers_with_buffers() -> None:
    """The module is as its own calls have left it, however often it was measured."""
    module, after = Counting(WIDTH), {}

    def call() -> None:
        module(torch.randn(16, WIDTH))
        after.update(copy.deepcopy(module.state_dict()))

    right = kernel("K", lambda self, input: nn.BatchNorm1d.forward(self, input))
    (one,) = measured("Counting", right, call).cells_on("cpu")
    assert "kernels.K" in one.times
    assert all(torch.equal(value, after[name]) for name, value in module.state_dict().items())


def test_calls_under_autocast_and_with_random_numbers() -> None:
    """Candidates are compared and timed under the autocast of the call; the user's random numbers go on as before."""
    module = Narrow()

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(torch.ones(2, WIDTH))

    (one,) = measured("Narrow", kernel("K", lambda self, x: x @ self.weight.t()), call).cells_on("cpu")
    assert "kernels.K" in one.times
    torch.manual_seed(0)
    (one,) = measured("drops", lambda x: functional.dropout(x, 0.5), lambda: drops(torch.ones(2, WIDTH))).cells_on(
        "cpu"
    )
    assert len(one.times) == 2
    number = torch.rand(1)
    torch.manual_seed(0)
    drops(torch.ones(2, WIDTH))
    assert torch.equal(torch.rand(1), number)


def test_what_measuring_holds() -> None:
    """No copy of a weight while calls are recorded; nothing of calls, copies and modules afterwards."""
    weight, seen, kept = nn.Parameter(torch.ones(WIDTH)), list[Any](), list[bool]()

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.extend((weakref.ref(x), weakref.ref(weight)))
        return weight * x

    def call() -> None:
        weighed(torch.ones(4, WIDTH), weight)
        subjects = (each for each in gc.get_objects() if type(each).__name__ == "RacedCall")
        kept.extend(each.recorded.call.args[1] is weight for each in subjects)

    with torch.no_grad():
        measured("weighed", forward, call)
    measured("weighed", forward, call)
    gc.collect()
    assert kept == [True, True]
    assert len(seen) > 20 and all(each() is None or each() is weight for each in seen)


def test_a_reference_that_cannot_be_run_again() -> None:
    """No choice is made for it, with the reason, whether it fails on copies or while it is timed."""
    ones, given = torch.ones(2, WIDTH), [torch.ones(2, WIDTH)]

    @use_kernel_forward_from_hub("once")
    def once(y: torch.Tensor, x: list[torch.Tensor] | None = None) -> torch.Tensor:
        return (x or given).pop() + y

    with torch.no_grad(), pytest.warns(KernelsWarning, match="once, inference, .*the reference fails: IndexError"):
        assert measured("once", lambda y, x=None: y + 1, lambda: once(ones)).machines[0].cells == ()
    with torch.no_grad(), pytest.warns(KernelsWarning, match="once, inference, .*raises while it is timed: IndexError"):
        assert measured("once", lambda y, x=None: y + 1, lambda: once(ones, [ones] * 3)).machines[0].cells == ()


def test_a_gpu_that_slows_down_slows_down_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays are made in turns: the faster run is found while the clock falls to a half, whichever is first."""
    clock = [0.0, 0]

    def runs(seconds: float) -> None:
        clock[0] += seconds * (1 + clock[1] / 100)  # each of the first replays is slower than the one before
        clock[1] = min(clock[1] + 1, 100)

    def replays(times: int, pool: object, *steps: Any) -> Any:
        return lambda: [step() for _ in range(times) for step in steps]

    def between(run: Any, before: Any = lambda: None) -> float:
        before()
        start = clock[0]
        run()
        return clock[0] - start

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(timing, "_replays", replays)
    monkeypatch.setattr(timing, "_between", between)
    monkeypatch.setattr(timing, "_FLUSH", 1)
    for order in (("slow", "quick"), ("quick", "slow")):
        clock[:] = 0.0, 0
        work = {"slow": lambda: runs(1.05e-3), "quick": lambda: runs(1e-3)}
        found = timing.device_times({name: work[name] for name in order}, torch.device("cpu"), 0.2)
        assert 1e-3 < found["quick"][0] < found["slow"][0] < 2.1e-3


# --- The file ---------------------------------------------------------------------------------------


def test_files_that_would_be_read_for_ever(tmp_path: Path) -> None:
    """A pipe, a folder and a file that is too large are errors that name them, and are left alone."""
    pipe, large = tmp_path / "pipe.json", tmp_path / "large.json"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path in (pipe, large, tmp_path, Path("/dev/zero")):
        for use in (Choice.load, use_choice, choosing, made(cell(A_FIRST)).save):
            with pytest.raises(ArgumentError, match=rf"{path.name}.*no regular file of at most 64 MiB"):
                use(path)


def test_two_that_save_at_once(tmp_path: Path) -> None:
    """Each adds to the file: what another one saves meanwhile is not dropped, and no lock is left."""
    path = tmp_path / "new" / "choice.json"
    saves = [made(cell(A_FIRST, 1 << number)).save for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda save: save(path), saves))
    assert len(Choice.load(path).cells_on("cpu")) == 16
    assert list(path.parent.iterdir()) == [path]


def test_a_cell_of_captured_times_has_reasons_only_for_those_without_a_time() -> None:
    """The reference that was captured has a time and no empty reason beside it; one that cannot be captured has one."""
    layer = SimpleNamespace(name="Twice")
    key, recorded = (torch.float32, WIDTH, 1), SimpleNamespace(layer=layer)
    subject: Any = SimpleNamespace(key=key, recorded=recorded, device=torch.device("cuda"), mode="inference", text="")
    running = _Race(subject, lambda name, action: "")
    why = {REFERENCE: "", "quick": "", "waiting": "it cannot be captured"}
    (found,) = running.cell("captured", {REFERENCE: 2.0, "quick": 1.0}, why)
    assert found.lost == {"waiting": "it cannot be captured"} and set(found.times) == {REFERENCE, "quick"}
    running.lost[REFERENCE] = "it lacks what is required"
    (found,) = running.cell("captured", {REFERENCE: 2.0, "quick": 1.0}, why)
    assert found.lost[REFERENCE] == "it lacks what is required"
