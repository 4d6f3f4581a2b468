"""Modes: the same preference and the same refusals."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest
from parity_scene import SIDES, Both, Side, able

CALLS = ("INFERENCE", "TRAINING", "INFERENCE|TORCH_COMPILE", "TRAINING|TORCH_COMPILE")
REGISTERED = (*CALLS, "FALLBACK")
FACTORS = {mode: 3.0 + number for number, mode in enumerate(REGISTERED)}
SETS = list(chain.from_iterable(combinations(REGISTERED, size) for size in range(1, len(REGISTERED) + 1)))
ATOMS = ("FALLBACK", "TRAINING", "INFERENCE", "TORCH_COMPILE")


@pytest.mark.parametrize("mode", CALLS)
def test_preference(both: Both, mode: str) -> None:
    """Of every set of registered modes, both choose the same for a call, and it is one of several answers."""

    def scenario(side: Side) -> list[float]:
        return [
            side.served({side.mode(registered): able(FACTORS[registered]) for registered in chosen}, mode)
            for chosen in SETS
        ]

    pair = both.run(scenario)
    assert pair.ours.get() == pair.theirs.get()
    assert len(SETS) == 31 and len(set(pair.theirs.get())) >= 3


@pytest.mark.parametrize(("left", "right"), list(product(ATOMS, ATOMS)))
def test_combinations(both: Both, left: str, right: str) -> None:
    """Both allow and forbid the same combinations of modes."""
    pair = both.run(lambda side: str((side.lib.Mode[left] | side.lib.Mode[right]).value))
    assert (pair.theirs.error is None) == (pair.ours.error is None)
    if pair.theirs.error is not None:
        pair.refuse(ValueError)


@pytest.mark.parametrize("mode", ["FALLBACK", "TORCH_COMPILE"])
def test_kernelize_wants_the_mode_of_a_call(both: Both, mode: str) -> None:
    """Both refuse to kernelize for a mode that no call has."""
    both.run(lambda side: side.served(able(3), mode)).refuse(ValueError)


def test_members() -> None:
    """Both have the same modes and the same cases of falling back, by name and value."""
    theirs, ours = (
        {enum: {m.name: m.value for m in getattr(side.lib, enum)} for enum in ("Mode", "KernelizeFallback")}
        for side in SIDES
    )
    assert theirs["Mode"].keys() == ours["Mode"].keys() == set(ATOMS)
    assert theirs["KernelizeFallback"] == ours["KernelizeFallback"] != {}
    for combined in ("DEFAULT", "ALL", "NONE"):
        values = [side.lib.KernelizeFallback[combined].value for side in SIDES]
        assert values[0] == values[1]
