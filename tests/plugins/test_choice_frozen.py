"""A measured choice in a decision file: each shape keeps its kernel, without the measurements and on other machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels_core import DecisionError, DecisionFile, Mode, PluginManager, forget, kernelize, receipt
from kernels_plugins import numerics, use_choice, use_kernel_mapping
from kernels_plugins.choice import machine
from kernels_plugins.choice.choice import Choice
from kernels_plugins.mapping import register_kernel_mapping
from kernels_plugins.numerics import plugin as numerics_plugin

from .test_choice import (
    A_FIRST,
    B_FIRST,
    BOTH,
    REFERENCE_FIRST,
    A,
    B,
    Twice,
    cell,
    choice_plugin,  # noqa: F401 - for all tests here
    made,
    reporting,
    served,
)

SPLIT = made(cell(REFERENCE_FIRST), cell(A_FIRST, 16), cell(B_FIRST, 1024))
ROWS, WINNERS = (1, 16, 1024), ["reference", "kernels.A", "kernels.B"]
NAMES = [name.rpartition(".")[2] for name in WINNERS]
EVAL: Any = {"device": "cpu", "mode": Mode.INFERENCE}


@pytest.fixture
def freeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Choice], Path]:
    """Freeze under a choice, and replay without it."""

    def freeze(choice: Choice) -> Path:
        place = tmp_path / "kernels.decisions.json"
        register_kernel_mapping(BOTH)
        with use_choice(choice):
            assert receipt(Twice(), **EVAL).freeze(place)
        monkeypatch.setenv("KERNELS_DECISIONS", str(place))
        register_kernel_mapping({})
        return place

    return freeze


def test_each_shape_keeps_its_kernel(freeze: Callable[[Choice], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The winners of three shapes serve them on another machine, unmeasured; a kernel that is new is not asked."""
    place = freeze(SPLIT)
    monkeypatch.setattr(machine, "_processor", lambda: "another one")
    register_kernel_mapping({"Twice": {"cpu": [reporting("New"), B, A]}})
    assert served(Twice(), *ROWS) == NAMES
    assert served(kernelize(Twice(), **EVAL), *ROWS) == NAMES
    (layer,) = DecisionFile.from_file(place).models[0].decided
    assert {kernel.source for kernel in layer.kernels} == {"kernels.A", "kernels.B"}
    orders = {rows: order[0] for _, _, rows, order in layer.kernels[0].record["eager"]}
    assert list(orders.values()) == WINNERS
    assert "for the shapes that it was measured best for" in str(DecisionFile.from_file(place))


def test_a_choice_that_is_in_use_does_not_win_over_the_file(freeze: Callable[[Choice], Path]) -> None:
    """Another measurement, made since, changes nothing under the file."""
    freeze(SPLIT)
    with use_choice(made(cell(A_FIRST), cell(A_FIRST, 16), cell(A_FIRST, 1024))):
        assert served(Twice(), *ROWS) == NAMES


def test_one_winner(freeze: Callable[[Choice], Path]) -> None:
    """Where one kernel wins all shapes, only that is frozen, as one that serves all calls."""
    place = freeze(made(cell(B_FIRST), cell(B_FIRST, 16)))
    register_kernel_mapping({"Twice": {"cpu": [A, B]}})
    assert served(Twice(), *ROWS) == ["B"] * 3
    (kernel,) = DecisionFile.from_file(place).models[0].decided[0].kernels
    assert (kernel.source, kernel.record) == ("kernels.B", None)


def test_the_reference_wins(freeze: Callable[[Choice], Path]) -> None:
    """Where the reference wins all shapes, that is the decision."""
    freeze(made(cell(REFERENCE_FIRST)))
    assert served(Twice(), *ROWS) == ["reference"] * 3


def test_without_the_plugin(freeze: Callable[[Choice], Path], isolated_plugins: PluginManager) -> None:
    """A file with a measured choice cannot be replayed without the plugin that keeps kernels to shapes: an error."""
    freeze(SPLIT)
    isolated_plugins.unregister("choice")
    with pytest.raises(DecisionError, match="KERNELS_PLUGINS leaves out 'choice'"), torch.no_grad():
        Twice()(torch.ones(1, 8))


def test_a_malformed_record(freeze: Callable[[Choice], Path]) -> None:
    """A record that was edited by hand is an error, and no kernel serves."""
    place = freeze(SPLIT)
    value = json.loads(place.read_text())
    for one in value["models"][0]["decided"][0]["kernels"]:
        one["record"]["eager"] = [["no dtype", 1]]
    place.write_text(json.dumps(value))
    register_kernel_mapping({})
    with use_kernel_mapping({}), pytest.raises(DecisionError, match="has a malformed choice for"), torch.no_grad():
        Twice()(torch.ones(1, 8))


def test_a_kernel_for_each_number_of_rows_where_rows_must_not_differ(
    freeze: Callable[[Choice], Path], isolated_plugins: PluginManager
) -> None:
    """A file that was frozen without the requirement is an error under it, whatever is known of each of its kernels."""
    isolated_plugins.register(numerics_plugin, "numerics")
    freeze(SPLIT)
    with numerics("batch_invariant"), pytest.raises(DecisionError, match="batch_invariant is required: freeze where"):
        served(Twice(), 16)
    assert served(Twice(), *ROWS) == NAMES


def test_a_denied_winner_leaves_its_shapes_to_no_other_kernel(
    freeze: Callable[[Choice], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks serve these shapes by the kernel that is denied here: an error, dispatched and kernelized."""
    freeze(SPLIT)
    frozen, dispatched = kernelize(Twice(), **EVAL), Twice()
    monkeypatch.setenv("KERNELS_DENY", "kernels.A")
    forget()
    for module in (frozen, dispatched):
        with pytest.raises(DecisionError, match=r"(?s)Found: kernels\.B .*; for kernels\.A: .*KERNELS_DENY"):
            served(module, 16)
