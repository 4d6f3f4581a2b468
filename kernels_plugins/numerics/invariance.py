"""`batch_invariant`: the bits of a row among fewer rows, elsewhere, and beside others; forward and backward."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels_core import error_text

from ..oracle.inputs import DTYPES
from .bits import differing, size_of
from .rows import LAYOUTS, Forward, NotTaken, Rows

Case = tuple[torch.dtype, str]
Ran = Callable[[Rows, Any, float | None, torch.Tensor | None], dict[str, torch.Tensor]]
"""Runs rows, of which those that are not kept hold a number; returns tensors with rows in their first dimension."""

_SIZES = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 129, 255, 256, 257, 512),
    *(1000, 1024, 2048, 3000, 4095, 4096),
)
"""Numbers of rows that are tried, where kernels may change their way: powers of two, and those beside."""
_FEW = (1, 2, 3, 16, 17, 64, 256, 1024, 4095, 4096)
_EACH_TO = 256
_TILE = 128
_BUDGET = 3.0
"""Seconds that runs with `_more` numbers of rows may take; on a layer that needs more, fewer are tried."""
_MANY = 64
"""Rows that are compared in parts of each size, or more."""
_VECTOR = 64
"""A number of elements that vectors of a CPU divide without a rest."""
_FILLS = (torch.inf, -torch.inf, torch.nan, 0.0, 1e4)
_AT_ONCE = 32
"""Parts that are compared before the device is waited for."""


@dataclass(frozen=True)
class Judgement:
    """Whether an implementation has a property, as far as it was found out.

    Attributes:
        has: Whether it has it; None if that could not be found out.
        why: The smallest input that was found to show that it has not; why it is not known; or the inputs tried.
        case: The dtype and the layout in which rows depend on others.
        every: Whether every number of rows was tried.
    """

    has: bool | None
    why: str = ""
    case: Case | None = None
    every: bool = False

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'no', None: 'not known'}[self.has] }: {self.why}"


BACKWARD = "batch_invariant, backward"
"""The name of the finding about gradients of inputs, a part of `batch_invariant` for calls that autograd records."""

NOT_TAKEN = "it passes such calls on to the next candidate"
PASSED_ON = "it passes on calls with other rows, dtypes or modes, which another implementation computes"


def joined(found: Mapping[str, Judgement], *, training: bool) -> dict[str, Judgement]:
    """Return a finding for each property: in training, `batch_invariant` is about gradients of inputs, too."""
    both = dict(found)
    backward, outputs = both.pop(BACKWARD, None), both.get("batch_invariant")
    if training and outputs is not None and outputs.has:
        if backward is None:  # not known yet
            del both["batch_invariant"]
        else:
            why = f"{outputs.why}; {backward.why}" if backward.has else backward.why
            every = outputs.every and backward.every
            both["batch_invariant"] = Judgement(backward.has, why, backward.case, every)
    return both


def short(error: Exception) -> str:
    """Name an error, with the first line of its text."""
    return error_text(error).partition("\n")[0]


def batch_invariant(
    rows: Rows | str, forward: Forward, only: Case | None = None, *, whole_vectors: bool = False, every: bool = False
) -> Judgement:
    """Compare the bits of rows among fewer, elsewhere, and beside others, in each dtype and layout, or in one.

    Args:
        rows: The rows, or why there are none.
        forward: The implementation.
        only: The dtype and the layout to try; None for all.
        whole_vectors: Whether to compare parts only whose number of elements is a multiple of `_VECTOR`.
        every: Whether to try every number of rows, in each dtype, where rows lie without gaps.
    """
    if isinstance(rows, str):
        return Judgement(None, rows)
    given = rows.dtype
    tried, left_out, most = [], [], 0
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
            laid = replace(varied, layout=layout)
            sizes = _FEW if layout else range(1, rows.count) if every else _SIZES
            more = [] if layout or every or dtype is not given else _more(rows.count)
            reason, count = _rows_differ(laid, _forwards(forward), sizes, more, _VECTOR if whole_vectors else 1)
            if reason:
                return Judgement(False, reason, (dtype, layout))
            most = max(most, count)
    shape = rows.described(rows.count).replace(f" {str(given).removeprefix('torch.')}", "")
    why = f"{_numbers(rows.count, most, every)} of {shape}, {', '.join(tried)}"
    return Judgement(True, why + (f"; not {', '.join(left_out)}" if left_out else ""), every=every)


def backward_invariant(
    rows: Rows | str, forward: Forward, *, whole_vectors: bool = False, every: bool = False
) -> Judgement:
    """Compare the bits of the gradients of a row's inputs in the same ways, in the given dtype, without gaps.

    Those of parameters are sums over all rows.
    """
    if isinstance(rows, str):
        return Judgement(None, rows)
    try:
        run = rows.backwards(forward)
        if run is None:
            return Judgement(True, "no input with rows gets a gradient")
        sizes, more = (range(1, rows.count), []) if every else (_SIZES, _more(rows.count))
        reason, count = _rows_differ(rows, run, sizes, more, _VECTOR if whole_vectors else 1)
    except NotTaken:
        raise
    except Exception as error:
        return Judgement(None, f"its backward raises {short(error)}")
    if reason:
        return Judgement(False, f"in backward, of the gradients of inputs: {reason}", (rows.dtype, ""))
    return Judgement(True, f"gradients of inputs in {_numbers(rows.count, count, every)}", every=every)


def _numbers(rows: int, tried: int, every: bool) -> str:
    return f"{'each of ' if every else ''}1 to {rows:,} rows{'' if every else f' ({tried} numbers)'}"


def _more(count: int) -> list[int]:
    """Return each small number of rows, multiples of tiles and those beside, and some others, the same each time."""
    tiles = [n for tile in range(_TILE, count, _TILE) for n in (tile - 1, tile, tile + 1)]
    generator = torch.Generator("cpu").manual_seed(0)
    others = torch.randint(1, count + 1, (32,), generator=generator, device="cpu").tolist()
    return [n for n in dict.fromkeys((*range(1, min(_EACH_TO, count)), *tiles, *others)) if n not in _SIZES]


def _rows_differ(rows: Rows, run: Ran, sizes: Iterable[int], more: Iterable[int], multiple: int) -> tuple[str, int]:
    """Describe the smallest input that was found for which the bits of a row depend on other rows; else empty.

    Only parts are compared whose number of elements is a multiple of a number. Of the numbers of rows in `more`, as
    many are tried as there is time for. Returns how many there were in all, too.
    """
    count, device = rows.count, next(iter(rows.call.inputs.values())).device
    whole = run(rows, slice(None), None, None)
    everything = torch.arange(count, device=device)
    # In small parts, such as the one row of a decoder's step, most rows may have the same bits by chance: many of them.
    starts = [
        (n, i * count // many)
        for n in sizes
        for many in [1 if rows.layout or n not in _SIZES else max(_MANY // n, 1)]
        for i in range(many)
    ]
    starts += [(n, at) for n in (1, 2, 5, 64) for at in (1, 3, count // 2, count - n) if 0 < at <= count - n]
    starts = [(n, min(at, count - n)) for n, at in dict.fromkeys(starts) if n < count]
    parts = [everything.flip(0), *(everything[at : at + n] for n, at in starts)]
    others = [everything[:n] for n in more if n < count]
    remaining = (p for p in itertools.chain(parts, _in_time(others)) if len(p) * rows.width % multiple == 0)
    tried: set[int] = set()
    while some := [
        (part, _of_rows(run(rows, part, None, None), {path: t[part] for path, t in whole.items()}))
        for part in itertools.islice(remaining, _AT_ONCE)
    ]:
        flags = torch.stack([differ.any() for _, differ in some]).tolist()  # waits once
        for (part, differ), flag in zip(some, flags, strict=True):
            if flag:
                return _shrunk(rows, run, whole, int(part[differ][0]), len(part)), 0
        tried.update(len(part) for part, _ in some)
    kept = everything % 3 == 1
    for fill in _FILLS if count > 1 else ():
        other = run(rows, slice(None), fill, kept)  # one that raises here is not known to be invariant
        if bool((differ := _of_rows(other, whole) & kept).any()):
            return _beside(rows, run, fill, int(differ.sum()), int(kept.sum())), 0
    return "", len(tried)


def _in_time(parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield parts until the budget is spent, which begins with the first."""
    end = time.perf_counter() + _BUDGET
    yield from itertools.takewhile(lambda _: time.perf_counter() < end, parts)


def _forwards(forward: Forward) -> Ran:
    def run(rows: Rows, part: Any, fill: float | None, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
        found = rows.run(forward, rows.of(part, fill, kept))
        if found is None:
            raise NotTaken
        return found

    return run


def _of_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return which rows differ in a bit of any output."""
    differ = [differing(one[path], other[path]).reshape(len(one[path]), -1).any(1) for path in one]
    return torch.stack(differ).any(0)


def _sizes_of(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    masks = {path: differing(one[path], other[path]) for path in one}
    return "; ".join(
        size_of(one[path][mask], other[path][mask], mask.numel()) for path, mask in masks.items() if mask.any()
    )


def _shrunk(rows: Rows, run: Ran, whole: dict[str, torch.Tensor], row: int, among: int) -> str:
    """Find the fewest rows among which a row has other bits than alone, and how many rows change bits."""
    device = next(iter(rows.call.inputs.values())).device
    order = torch.roll(torch.arange(rows.count, device=device), -row)  # the row itself is the first
    alone = run(rows, order[:1], None, None)

    def differs(count: int) -> str:
        found = run(rows, order[:count], None, None)
        return _sizes_of({path: t[:1] for path, t in found.items()}, alone)

    sizes = sorted({*(size for size in (*_SIZES, among) if 1 < size < rows.count), rows.count})
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
        int(_of_rows(run(rows, part, None, None), {path: t[part] for path, t in whole.items()}).sum()) for part in parts
    )
    total = f"{changed:,} of {rows.count:,} rows have other bits in parts of {low:,}; " if changed else ""
    return (
        f"{total}smallest input: "
        f"{rows.described(high)}, whose first row (row {row} of those tried) has other bits than alone: {differs(high)}"
    )


def _beside(rows: Rows, run: Ran, fill: float, wrong: int, among: int) -> str:
    """Find the fewest rows in which a row has other bits where the others hold a number."""
    device = next(iter(rows.call.inputs.values())).device
    for count in (2, 3, 4, 8, 16, 64, 256, 1024, rows.count):
        if count > rows.count:
            break
        part = torch.arange(count, device=device)
        kept = part % 3 == 1
        plain, other = run(rows, part, None, None), run(rows, part, fill, kept)
        if text := _sizes_of(*({path: t[kept] for path, t in each.items()} for each in (other, plain))):
            break
    return (
        f"{wrong} of {among} rows have other bits beside rows that hold {fill:g}; smallest input: "
        f"{rows.described(count)}, two of three rows filled with {fill:g}: {text}"
    )
