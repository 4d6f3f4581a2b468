"""The smallest input that shows that the bits of a row depend on other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .bits import differing, size_of
from .rows import Rows

Ran = Callable[[Rows, Any, float | None, torch.Tensor | None], dict[str, torch.Tensor]]
"""Runs rows, of which those that are not kept hold a number; returns tensors with rows in their first dimension."""

SIZES = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257, 512),
    *(1000, 1024, 2048, 3000, 4095, 4096),
)
"""Numbers of rows that are tried, where kernels may change their way: powers of two, and those beside."""


def differing_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which rows differ in a bit of any output; their dimensions may be arranged otherwise."""
    differ = [
        differing(one[path].reshape(other[path].shape), other[path]).reshape(len(other[path]), -1).any(1)
        for path in one
    ]
    return torch.stack(differ).any(0)


def _sizes_of(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    masks = {path: differing(one[path], other[path]) for path in one}
    return "; ".join(
        size_of(one[path][mask], other[path][mask], mask.numel()) for path, mask in masks.items() if mask.any()
    )


def shrunk(rows: Rows, run: Ran, whole: dict[str, torch.Tensor], part: torch.Tensor, place: int) -> str:
    """Find the fewest rows among which a row has other bits than alone, and where; and how many rows change bits.

    It differs at a place of a part of the rows from where it is in the whole.
    """
    row, unit = int(part[place]), rows.unit
    order = torch.roll(torch.arange(rows.count, device=part.device), -row)  # the row itself is the first
    alone = run(replace(rows, lead=()), order[:1], None, None)

    def differs(count: int, place: int = 0) -> str:
        found = run(rows, torch.roll(order, place)[:count], None, None)
        found = {path: t.reshape(-1, *alone[path].shape[1:])[place : place + 1] for path, t in found.items()}
        return _sizes_of(found, alone)

    most, some = rows.count // unit * unit, len(part)
    sizes = sorted({*(n * unit for n in (*SIZES, some // unit) if 1 < n * unit < most), most})
    at = next((index for index, size in enumerate(sizes) if differs(size)), None)
    if at is not None:
        low = sizes[at - 1] if at else 0
        count, place = _least(low, sizes[at], differs, unit), 0
    else:
        seen = [(some, place), *([] if rows.lead else [(rows.count, row)])]
        found = [smaller for one in seen if differs(*one) for smaller in _elsewhere(*one, differs, unit)]
        if not found:
            return (
                f"row {row} has other bits elsewhere among {some:,} of {rows.count:,} rows; "
                f"input: {rows.described(rows.count)}"
            )
        count, place = min(found)
    changed = ""
    if not place and unit == 1:
        changed = _changed(rows, run, whole, count if rows.lead else count - 1)
    where = f"row {place + 1:,}" if place else "first row"
    return (
        f"{changed}smallest input: {rows.described(count)}, whose {where} (row {row} of those tried) has other bits "
        f"than alone: {differs(count, place)}"
    )


def _changed(rows: Rows, run: Ran, whole: dict[str, torch.Tensor], size: int) -> str:
    size = max(size, -(-rows.count // 256))  # in at most so many runs
    parts = [slice(at, min(at + size, rows.count)) for at in range(0, rows.count, size)]
    flags = [differing_rows(run(rows, p, None, None), {path: t[p] for path, t in whole.items()}).sum() for p in parts]
    changed = int(torch.stack(flags).sum())
    return f"{changed:,} of {rows.count:,} rows have other bits in parts of {size:,}; " if changed else ""


def _elsewhere(count: int, place: int, differs: Callable[[int, int], str], unit: int) -> list[tuple[int, int]]:
    """Return smaller numbers of rows and places at which a row differs: from the first row on, and from the last."""
    first = _least(0, place, lambda at: differs(count, at))
    fewer = _least(first // unit * unit, count, lambda n: differs(n, first), unit)
    rest = count - 1 - place
    fewest = _least(rest // unit * unit, count, lambda n: differs(n, n - 1 - rest), unit)
    return [(fewer, first), (fewest, fewest - 1 - rest)]


def _least(low: int, high: int, holds: Callable[[int], object], step: int = 1) -> int:
    """Return the least number above `low` for which something holds, as it does for `high`."""
    while high - low > step:
        middle = low + (high - low) // step // 2 * step
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def beside(rows: Rows, run: Ran, fill: float, wrong: int, among: int) -> str:
    """Find the fewest rows in which a row has other bits where the others hold a number."""
    device = next(iter(rows.call.inputs.values())).device
    for count in (2, 3, 4, 8, 16, 64, 256, 1024, rows.count):
        if count > rows.count:
            break
        part = torch.arange(count, device=device)
        kept = part % 3 == 1
        plain, other = run(rows, part, None, None), run(rows, part, fill, kept)
        both = ({path: t.reshape(count, -1)[kept] for path, t in each.items()} for each in (other, plain))
        if text := _sizes_of(*both):
            break
    return (
        f"{wrong} of {among} rows have other bits beside rows that hold {fill:g}; smallest input: "
        f"{rows.described(count)}, two of three rows filled with {fill:g}: {text}"
    )
