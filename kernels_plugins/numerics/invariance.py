"""`batch_invariant`: the bits of a row among fewer rows, elsewhere, and beside others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..oracle.inputs import DTYPES
from .bits import differing, size_of
from .rows import LAYOUTS, Forward, Rows

Case = tuple[torch.dtype, str]
_SIZES = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257, 512),
    *(1000, 1024, 2048, 3000, 4095, 4096),
)
"""Numbers of rows that are tried, where kernels may change their way: powers of two, and those beside."""
_FEW = (1, 2, 3, 16, 17, 64, 256, 1024, 4095, 4096)
_MANY = 64
"""Rows that are compared in parts of each size, or more."""
_VECTOR = 64
"""A number of elements that vectors of a CPU divide without a rest."""
_FILLS = (torch.inf, -torch.inf, torch.nan, 0.0, 1e4)


@dataclass(frozen=True)
class Judgement:
    """Whether an implementation has a property, as far as it was found out.

    Attributes:
        has: Whether it has it; None if that could not be found out.
        why: The smallest input that was found to show that it has not; why it is not known; or the inputs tried.
        case: The dtype and the layout in which rows depend on others.
    """

    has: bool | None
    why: str = ""
    case: Case | None = None

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'no', None: 'not known'}[self.has] }: {self.why}"


NOT_TAKEN = "it passes such calls on to the next candidate"
PASSED_ON = "it passes on calls with other rows, dtypes or modes, which another implementation computes"


class NotTaken(Exception):  # noqa: N818 - no error: an answer
    """A kernel takes a call, and passes on one like it, whose rows another implementation computes."""


def short(error: Exception) -> str:
    """Name an error, with the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"


def batch_invariant(
    rows: Rows | str, forward: Forward, only: Case | None = None, *, whole_vectors: bool = False
) -> Judgement:
    """Compare the bits of rows among fewer, elsewhere, and beside others, in each dtype and layout, or in one."""
    if isinstance(rows, str):
        return Judgement(None, rows)
    given = next(t.dtype for t in rows.call.inputs.values() if t.is_floating_point())
    tried, left_out = [], []
    dtypes = dict.fromkeys((given, *(DTYPES if given in DTYPES else ())))
    for dtype in dtypes if only is None else only[:1]:
        name = str(dtype).removeprefix("torch.")
        try:
            varied = rows.in_dtype(dtype)
            whole = varied.run(forward, varied.of(slice(None)))
        except Exception as error:
            if dtype is given:
                raise
            whole, name = None, f"{name} ({short(error)})"
        if whole is None:
            left_out.append(name)
            if dtype is given:
                raise NotTaken
            continue
        tried.append(name)
        for layout in ("",) if whole_vectors else LAYOUTS if only is None else only[1:]:
            if reason := _rows_differ(replace(varied, layout=layout), forward, _VECTOR if whole_vectors else 1):
                return Judgement(False, reason, (dtype, layout))
    shape = rows.described(rows.count).replace(f" {str(given).removeprefix('torch.')}", "")
    why = f"1 to {rows.count:,} rows of {shape}, {', '.join(tried)}"
    return Judgement(True, why + (f"; not {', '.join(left_out)}" if left_out else ""))


def _rows_differ(rows: Rows, forward: Forward, multiple: int) -> str:
    """Describe the smallest input that was found for which the bits of a row depend on other rows; else empty.

    Only parts are compared whose number of elements is a multiple of a number.
    """
    count, device = rows.count, next(iter(rows.call.inputs.values())).device
    whole = _ran(rows, forward, slice(None))
    everything = torch.arange(count, device=device)
    sizes = [n for n in (_FEW if rows.layout else _SIZES) if n < count]
    # In small parts, such as the one row of a decoder's step, most rows may have the same bits by chance: many of them.
    starts = [
        (n, i * count // many)
        for n in sizes
        for many in [1 if rows.layout else max(_MANY // n, 1)]
        for i in range(many)
    ]
    parts = [everything[at : at + n] for n, at in dict.fromkeys((n, min(at, count - n)) for n, at in starts)]
    parts += [
        everything[at : at + n] for n in (1, 2, 5, 64) for at in (1, 3, count // 2, count - n) if 0 < at <= count - n
    ]
    parts.append(everything.flip(0))
    for part in parts:
        if len(part) * rows.width % multiple:
            continue
        rows_now = _ran(rows, forward, part)
        differ = _of_rows(rows_now, {path: t[part] for path, t in whole.items()})
        if bool(differ.any()):
            return _shrunk(rows, forward, whole, int(part[differ][0]), len(part))
    kept = everything % 3 == 1
    for fill in _FILLS if count > 1 else ():
        other = _ran(rows, forward, slice(None), fill, kept)  # one that raises here is not known to be invariant
        if bool((differ := _of_rows(other, whole) & kept).any()):
            return _beside(rows, forward, fill, int(differ.sum()), int(kept.sum()))
    return ""


def _ran(
    rows: Rows, forward: Forward, part: Any, fill: float | None = None, kept: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    found = rows.run(forward, rows.of(part, fill, kept))
    if found is None:
        raise NotTaken
    return found


def _of_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which rows differ in a bit of any output."""
    differ = [differing(one[path], other[path]).flatten(1).any(1) for path in one]
    return torch.stack(differ).any(0)


def _sizes_of(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    masks = {path: differing(one[path], other[path]) for path in one}
    return "; ".join(
        size_of(one[path][mask], other[path][mask], mask.numel()) for path, mask in masks.items() if mask.any()
    )


def _shrunk(rows: Rows, forward: Forward, whole: dict[str, torch.Tensor], row: int, among: int) -> str:
    """Find the fewest rows among which a row has other bits than alone, and how many rows change bits."""
    device = next(iter(rows.call.inputs.values())).device
    order = torch.roll(torch.arange(rows.count, device=device), -row)  # the row itself is the first
    alone = _ran(rows, forward, order[:1])

    def differs(count: int) -> str:
        found = _ran(rows, forward, order[:count])
        return _sizes_of({path: t[:1] for path, t in found.items()}, alone)

    sizes = [*(size for size in _SIZES if 1 < size < rows.count), rows.count]
    at = next((place for place, size in enumerate(sizes) if differs(size)), None)
    if at is None:
        return (
            f"row {row} has other bits elsewhere among {among:,} of {rows.count:,} rows; "
            f"input: {rows.described(rows.count)}"
        )
    low, high = sizes[at - 1] if at else 1, sizes[at]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle, high)
    low = max(low, -(-rows.count // 256))  # in at most so many runs
    parts = [slice(at, at + low) for at in range(0, rows.count, low)]
    changed = sum(
        int(_of_rows(_ran(rows, forward, part), {path: t[part] for path, t in whole.items()}).sum()) for part in parts
    )
    total = f"{changed:,} of {rows.count:,} rows have other bits in parts of {low:,}; " if changed else ""
    return (
        f"{total}smallest input: "
        f"{rows.described(high)}, whose first row (row {row} of those tried) has other bits than alone: {differs(high)}"
    )


def _beside(rows: Rows, forward: Forward, fill: float, wrong: int, among: int) -> str:
    """Find the fewest rows in which a row has other bits where the others hold a number."""
    device = next(iter(rows.call.inputs.values())).device
    for count in (2, 3, 4, 8, 16, 64, 256, 1024, rows.count):
        if count > rows.count:
            break
        part = torch.arange(count, device=device)
        kept = part % 3 == 1
        plain, other = _ran(rows, forward, part), _ran(rows, forward, part, fill, kept)
        if text := _sizes_of(*({path: t[kept] for path, t in each.items()} for each in (other, plain))):
            break
    return (
        f"{wrong} of {among} rows have other bits beside rows that hold {fill:g}; smallest input: "
        f"{rows.described(count)}, two of three rows filled with {fill:g}: {text}"
    )
