"""`batch_invariant`: the bits of a row among fewer rows, elsewhere, and beside others; forward and backward."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels_core import error_text

from ..oracle.inputs import DTYPES
from .rows import LAYOUTS, Forward, NotTaken, Rows
from .smallest import SIZES, Ran, beside, differing_rows, shrunk

Case = tuple[torch.dtype, str]

_FEW = (1, 2, 3, 16, 17, 64, 256, 1024, 4095, 4096)
_EACH_TO = 256
_TILE = 128
_BUDGET = 3.0
"""Seconds that runs with `_more` numbers of rows may take; on a layer that needs more, fewer are tried."""
_MANY = 64
"""Rows that are compared in parts of each size, or more."""
_VECTOR = 64
"""A number of elements that vectors of a CPU divide without a rest."""
_BLOCKS = (2, 3, 4, 7, 16, 64, 128, 512)
"""Lengths that are tried along a dimension in the middle, such as that of a sequence."""
_SOME = 512
"""Rows that are compared in blocks of such a length."""
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
        multiple = _VECTOR if whole_vectors else 1
        for layout in LAYOUTS if only is None else only[1:]:
            if layout and rows.width % multiple:
                continue  # each row has a rest of its own there
            laid = replace(varied, layout=layout)
            sizes = _FEW if layout else range(1, rows.count) if every else SIZES
            more = [] if layout or every or dtype is not given else _more(rows.count)
            reason, count = _rows_differ(laid, _forwards(forward), sizes, more, multiple)
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
        sizes, more = (range(1, rows.count), []) if every else (SIZES, _more(rows.count))
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
    return [n for n in dict.fromkeys((*range(1, min(_EACH_TO, count)), *tiles, *others)) if n not in SIZES]


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
        for many in [1 if rows.layout or n not in SIZES else max(_MANY // n, 1)]
        for i in range(many)
    ]
    starts += [(n, at) for n in (1, 2, 5, 64) for at in (1, 3, count // 2, count - n) if 0 < at <= count - n]
    starts = [(n, min(at, count - n)) for n, at in dict.fromkeys(starts) if n < count]
    parts = [everything.flip(0), *(everything[at : at + n] for n, at in starts)]
    others = [everything[:n] for n in more if n < count]
    reason, tried = _parts_differ(rows, run, whole, itertools.chain(parts, _in_time(others)), multiple)
    if not reason:
        reason = _neighbours_differ(rows, run, whole, _fills(rows.dtype))
    if not reason and not rows.layout:
        reason = _arranged(rows, run, whole, multiple)
    return reason, tried


def _parts_differ(
    rows: Rows, run: Ran, whole: dict[str, torch.Tensor], parts: Iterable[torch.Tensor], multiple: int
) -> tuple[str, int]:
    remaining = (part for part in parts if len(part) * rows.width % multiple == 0)
    tried: set[int] = set()
    while some := [
        (part, differing_rows(run(rows, part, None, None), {path: t[part] for path, t in whole.items()}))
        for part in itertools.islice(remaining, _AT_ONCE)
    ]:
        flags = torch.stack([differ.any() for _, differ in some]).tolist()  # waits once
        for (part, differ), flag in zip(some, flags, strict=True):
            if flag:
                return shrunk(rows, run, whole, part, int(differ.nonzero()[0])), 0
        tried.update(len(part) for part, _ in some)
    return "", len(tried)


def _neighbours_differ(rows: Rows, run: Ran, whole: dict[str, torch.Tensor], fills: Iterable[float]) -> str:
    kept = torch.arange(rows.count, device=next(iter(whole.values())).device) % 3 == 1
    for fill in fills if rows.count > 1 else ():
        other = run(rows, slice(None), fill, kept)  # one that raises here is not known to be invariant
        if bool((differ := differing_rows(other, whole) & kept).any()):
            return beside(rows, run, fill, int(differ.sum()), int(kept.sum()))
    return ""


def _fills(dtype: torch.dtype) -> tuple[float, ...]:
    """Return numbers for other rows to hold: those that spread, and finite ones at the ends of a dtype."""
    ends = (torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2) if dtype.is_floating_point else ()
    return (torch.inf, -torch.inf, torch.nan, 0.0, 1e4, -1e4, *ends)


def _arranged(rows: Rows, run: Ran, whole: dict[str, torch.Tensor], multiple: int) -> str:
    """Compare rows that lie along dimensions in the middle, as those of a sequence, with rows that lie along the first.

    Dimensions along which the reference computes other numbers are none of rows.
    """
    everything = torch.arange(rows.count, device=next(iter(whole.values())).device)
    mixing: set[int] = set()
    for lead in _leads(rows):
        axes = {axis for axis, size in enumerate(lead) if axis and size != 1}
        laid = replace(rows, lead=lead)
        if mixing & axes or laid.unit > rows.count:
            continue
        counts = SIZES if laid.unit == 1 else (1, 2, rows.given[0], _SOME // laid.unit)
        parts = [everything[: n * laid.unit] for n in counts if 0 < n * laid.unit <= rows.count]
        if laid.unit == 1:
            parts += [everything[at : at + n] for n in (2, 3, 5) for at in range(n, min(_MANY, rows.count - n), n)]
        try:
            reason = _parts_differ(laid, run, whole, parts, multiple)[0]
            if not reason and laid.unit == 1:
                reason = _neighbours_differ(laid, run, whole, [torch.nan])
        except Exception:  # also where it passes the call on
            if laid.mixes(3):
                mixing |= axes
                continue
            raise
        if reason and laid.mixes(rows.count):
            mixing |= axes
        elif reason:
            return reason
    return ""


def _leads(rows: Rows) -> list[tuple[int, ...]]:
    """Return shapes of the dimensions of rows to try, with -1 for as many as there are."""
    given, leads = rows.given, []
    for axis in range(1, len(given)):
        ones = [1] * (len(given) - axis - 1)
        leads.append((*[1] * axis, -1, *ones))
        leads += [(-1, *[1] * (axis - 1), size, *ones) for size in (*_BLOCKS, given[axis]) if size > 1]
    return list(dict.fromkeys([*leads, *([(-1, *given[1:])] if max(given[1:], default=1) > 1 else [])]))


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
