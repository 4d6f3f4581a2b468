"""A kernel that passes calls on calls the next one itself: that saves a dispatch, and changes nothing else."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import (
    KernelsWarning,
    Mode,
    count_calls,
    forget,
    kernelize,
    quarantine,
    quarantined,
    receipt,
    release,
    resolve,
)
from kernels_plugins import use_choice, use_kernel_mapping

from .test_choice import WIDTH, A, B, Twice, cell, choice_plugin, made, reporting, served  # noqa: F401
from .test_choice_served import anew, kernel  # noqa: F401

C = reporting("C")
NAMES = {"A": 1, "B": 16, "C": 1024}
"""The winner, and for how many rows."""


def chosen(*kernels: type[nn.Module]) -> Any:
    """Choose the first kernel for few rows, the second for more, and so on."""
    labels = [f"kernels.{one.__qualname__}" for one in kernels]
    cells = []
    for winner, rows in zip(labels, NAMES.values(), strict=False):
        times = {"reference": 3.0, **dict.fromkeys(labels, 2.0), winner: 1.0}
        cells += [cell(times, rows, mode=mode) for mode in ("inference", "training")]
    return made(*cells)


@contextlib.contextmanager
def serving(frozen: bool, *kernels: type[nn.Module], mode: Mode = Mode.INFERENCE) -> Any:
    """Serve a module by kernels, each for some numbers of rows: dispatched, or kernelized."""
    with use_kernel_mapping({"Twice": {"cpu": list(kernels)}}), use_choice(chosen(*kernels)):
        module = Twice().train(Mode.TRAINING in mode)
        yield kernelize(module, device="cpu", mode=mode) if frozen else module


def functions_called(module: nn.Module, rows: int, grad: bool = False) -> list[str]:
    """Return the Python functions that a warm call calls."""
    names: list[str] = []
    given = torch.ones(rows, WIDTH)
    with torch.set_grad_enabled(grad):
        module.forward(given)  # of another mode
        sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
        try:
            module.forward(given)
        finally:
            sys.setprofile(None)
    return names


@pytest.mark.parametrize("frozen", [False, True])
def test_each_winner_is_dispatched_once(frozen: bool) -> None:
    """Once the winners have been called, a call of the third runs no function more than a call of the first."""
    with serving(frozen, A, B, C) as module:
        assert served(module, *NAMES.values(), *NAMES.values()) == [*NAMES, *NAMES]
        first, second, third = (functions_called(module, rows) for rows in NAMES.values())
        assert first == second == third and first[1:] == ["limited", "forward", "__getattr__"]
        assert served(module, *NAMES.values()) == [*NAMES]


@pytest.mark.parametrize("how", ["quarantine", "scope", "forget"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_ends_a_decision_ends_it(frozen: bool, how: str) -> None:
    """A quarantine of the second winner, or a scope with other kernels, holds at the next call."""
    with serving(frozen, A, B, C) as module:
        served(module, *NAMES.values(), *NAMES.values())
        expected = [*NAMES]
        if how == "quarantine":
            found = resolve(Twice, device="cpu", mode=Mode.INFERENCE)
            quarantine(found.request.layer, B.forward, kernel="kernels.B", reason="wrong")
            expected[1] = "A" if served(module, 16) == ["A"] else "C"
        elif how == "forget":
            forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if how == "scope" and not frozen:
                with use_kernel_mapping({"Twice": {"cpu": C}}, inherit_mapping=False):
                    assert served(module, *NAMES.values()) == ["C"] * 3
            assert served(module, *NAMES.values(), *NAMES.values()) == [*expected, *expected]


def test_a_joined_kernel_that_raises() -> None:
    """The breaker blames the second winner, not the one that called it, and the call is answered."""
    fails: list[int] = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if fails:
            raise RuntimeError("boom")
        return x * self.weight

    bad = kernel("Bad", forward)
    with serving(False, A, bad, C) as module:
        for _ in range(2):
            assert served(module, *NAMES.values()) == ["A", "reference", "C"]
        fails.append(1)
        with pytest.warns(KernelsWarning, match=r"kernels\.Bad: it is in quarantine: it raised RuntimeError: boom"):
            assert served(module, 16) == ["reference"]
        assert [entry.kernel for entry in quarantined()] == ["kernels.Bad"]
        assert served(module, 1, 1024) == ["A", "C"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_joined_kernel_that_loses_gradients(frozen: bool) -> None:
    """It is found out at its first recorded call, also where it has served calls without gradients before."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.detach()

    lossy = kernel("Lossy", forward)
    with serving(frozen, A, lossy, C, mode=Mode.TRAINING) as module:
        served(module, *NAMES.values(), *NAMES.values())
        module(torch.ones(1, WIDTH)).sum().backward()  # the first winner is proven from here on
        module.weight.grad = None
        with pytest.warns(KernelsWarning, match="gradient"):
            module(torch.ones(16, WIDTH)).sum().backward()
        assert module.weight.grad is not None and module.weight.grad.sum() == 16 * WIDTH


@pytest.mark.parametrize("frozen", [False, True])
def test_proven_parts_are_joined_for_training(frozen: bool) -> None:
    """Once each winner has been trained, recorded calls are dispatched once, too, with the right gradients."""
    with serving(frozen, A, B, C, mode=Mode.TRAINING) as module:
        for _ in range(3):
            for rows in NAMES.values():
                module.weight.grad = None
                module(torch.ones(rows, WIDTH, requires_grad=True)).sum().backward()
                assert module.weight.grad.sum() == rows * WIDTH
        called: list[list[str]] = []
        for rows in NAMES.values():
            called.append(functions_called(module, rows, grad=True))
        assert called[0] == called[1] == called[2]


def test_joined_calls_are_counted() -> None:
    """A plugin that counts calls counts each for its own kernel, joined before or not."""
    with serving(False, A, B, C) as module:
        served(module, *NAMES.values(), *NAMES.values())
        with count_calls():
            served(module, 1, 16, 16, 1024)
            calls = receipt(module, device="cpu", mode=Mode.INFERENCE).rows[0].calls
    assert calls is not None and (calls["kernels.B"], calls["kernels.C"]) == (2, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_decisions_that_change_meanwhile(frozen: bool) -> None:
    """While another thread puts the second winner into quarantine and out, each call is right; then it is out."""
    stop = threading.Event()
    with serving(frozen, A, B, C) as module, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = resolve(Twice, device="cpu", mode=Mode.INFERENCE)

        def change() -> None:
            while not stop.is_set():
                release(quarantine(found.request.layer, B.forward, kernel="kernels.B", reason="wrong"))

        thread = threading.Thread(target=change)
        thread.start()
        with torch.no_grad():
            for turn in range(600):
                rows = (1, 16, 1024)[turn % 3]
                assert module(torch.ones(rows, WIDTH)).sum() == 2 * rows * WIDTH
        stop.set()
        thread.join()
        quarantine(found.request.layer, B.forward, kernel="kernels.B", reason="wrong")
        assert "B" not in served(module, 1, 16, 1024, 16)
