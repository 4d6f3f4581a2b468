"""`ChoiceCell`: the times of all candidates for one layer, dtype, width, number of rows, mode and context."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kernels_core import ArgumentError, set_module

Context = Literal["eager", "captured", "compiled"]
CONTEXTS: tuple[Context, ...] = ("eager", "captured", "compiled")
REFERENCE = "reference"
"""The name of the layer's own forward among the candidates."""

ALIAS = ", by another name"
"""The end of the reason of a candidate that is another one, which takes part."""

MARGINS: dict[Context, float] = {"eager": 0.02, "captured": 0.01, "compiled": 0.2}
"""The share of the time of the reference by which a kernel has to win: less is noise, and the reference is right.

The time of a GPU varies less than that of the CPU that launches its work; and in compiled code, a kernel also keeps the
compiler from fusing the layer with its neighbours.
"""

Key = tuple[torch.dtype, int, int]
"""Dtype and last dimension of the first tensor of a call, and `bucket_of` its rows."""

_INDICES = (torch.int32, torch.int64)
"""Dtypes of which every number is a row: the last dimension of such a tensor is as long as a sequence."""


def bucket_of(rows: int) -> int:
    """Return the number of the power of two that a number of rows lies in: 0, 1, 2-3, 4-7, ...

    Example:
        >>> [bucket_of(rows) for rows in (0, 1, 2, 3, 4, 4096)]
        [0, 1, 2, 2, 3, 13]
    """
    return rows.bit_length()


def key_of(tensor: torch.Tensor) -> Key:
    """Return the key of a call by its first tensor.

    Example:
        >>> key_of(torch.ones(4, 2, 64)), key_of(torch.zeros(1, 99, dtype=torch.long))
        ((torch.float32, 64, 4), (torch.int64, 1, 7))
    """
    *sizes, width = sizes_of(tensor)
    return tensor.dtype, width, bucket_of(math.prod(sizes))


def sizes_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return sizes whose last one is the width, and the product of the others the rows."""
    return (*tensor.shape, 1) if tensor.dtype in _INDICES or not tensor.dim() else tuple(tensor.shape)


@dataclass(frozen=True)
class ChoiceCell:
    """One race: all candidates on calls of one kind.

    Attributes:
        layer: The layer name.
        device: The type of the device.
        context: `"eager"` for calls that the CPU launches, `"captured"` for those that a CUDA graph replays,
            `"compiled"` for code of `torch.compile`.
        mode: `"inference"`, or `"training"` with the backward.
        dtype: That of the first tensor, such as `"bfloat16"`.
        width: The last dimension of the first tensor.
        bucket: The power of two of its rows: see `rows`.
        times: The seconds that each candidate took, by name; `"reference"` is the layer's own forward.
        lost: Why other candidates were not measured, by name; and why the reference serves only where nothing else
            does, if it lacks what is required of numbers.
        digests: A digest of the code of each candidate, where it has a file.
        busy: Whether a GPU is busy when such calls are launched, so that the times are those of the GPU.
    """

    layer: str
    device: str
    context: Context
    mode: Literal["inference", "training"]
    dtype: str
    width: int
    bucket: int
    times: Mapping[str, float] = field(hash=False)
    lost: Mapping[str, str] = field(default_factory=dict, hash=False)
    digests: Mapping[str, str] = field(default_factory=dict, hash=False)
    busy: bool = False

    def __post_init__(self) -> None:
        """Refuse times that cannot be those of a call."""
        bad = [name for name, time in self.times.items() if not 0 < time < 1e6]  # also NaN
        if bad or REFERENCE not in self.times:
            problem = f"the time of {bad[0]!r} is {self.times[bad[0]]}" if bad else "the reference has no time"
            raise ArgumentError(f"A measurement of layer {self.layer!r} is of no use: {problem}. Measure again.")

    @property
    def rows(self) -> str:
        """The numbers of rows that it is about, as text.

        Example:
            >>> ChoiceCell("N", "cpu", "eager", "inference", "float32", 64, 3, {"reference": 1e-6}).rows
            '4-7'
        """
        return str(self.bucket) if self.bucket < 2 else f"{1 << self.bucket - 1}-{(1 << self.bucket) - 1}"

    @property
    def margin(self) -> float:
        """The share of the time of the reference by which a kernel has to win.

        Example:
            >>> ChoiceCell("N", "cuda", "eager", "inference", "bfloat16", 64, 3, {"reference": 1e-3}, busy=True).margin
            0.01
        """
        return MARGINS["captured" if self.busy and self.context == "eager" else self.context]

    @property
    def order(self) -> tuple[str, ...]:
        """The candidates, best first: the reference before all that do not win by the margin, unless it has lost."""
        bar = self.times[REFERENCE] * (1 - self.margin)

        def rank(name: str) -> tuple[bool, float, bool, float]:
            time = self.times[name]
            return name in self.lost, min(time, bar), name != REFERENCE, time

        return tuple(sorted(self.times, key=rank))

    @property
    def winner(self) -> str:
        """The candidate that serves."""
        return self.order[0]

    def ratio(self, name: str) -> float:
        """Return the time of a candidate as a multiple of that of the reference."""
        return self.times[name] / self.times[REFERENCE]

    @property
    def place(self) -> tuple[str, ...]:
        """All but the results: cells with an equal place are about the same calls."""
        return self.layer, self.device, self.context, self.mode, self.dtype, str(self.width), str(self.bucket)

    @property
    def key(self) -> Key:
        """The key of its calls."""
        return getattr(torch, self.dtype), self.width, self.bucket

    @property
    def of_subject(self) -> tuple[str, str, str, Key]:
        """The place without the context: equal for all cells of one call."""
        return self.layer, self.device, self.mode, self.key

    @classmethod
    def read(cls, value: Any) -> ChoiceCell:
        """Make a cell of its parsed JSON.

        Raises:
            ArgumentError: If that is no cell.
        """
        try:
            cell = cls(**{**value, "times": dict(value["times"]), "lost": dict(value["lost"])})
            texts = (*cell.place[:5], *cell.times, *cell.lost, *cell.lost.values(), *cell.digests.values())
            sound = all(isinstance(text, str) for text in texts) and cell.mode in ("inference", "training")
            sound &= isinstance(getattr(torch, cell.dtype, None), torch.dtype) and cell.context in CONTEXTS
            sound &= all(type(number) is int and 0 <= number < 1 << 62 for number in (cell.width, cell.bucket))
            sound &= cell.bucket < 64 and type(cell.busy) is bool
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(f"a cell is malformed: {type(error).__name__}: {error}") from error
        if not sound:
            raise ArgumentError(f"a cell is malformed: {value!r}"[:500])
        return cell


def settled(cells: Sequence[ChoiceCell]) -> list[tuple[str, ...]]:
    """Return the candidates for each cell, best first, with few winners: one within the margin of the best is as good.

    The fewer there are, the fewer calls have to ask for their shape; where one serves all cells, none has to.

    Example:
        >>> place = ("Norm", "cpu", "eager", "inference", "float32", 64)
        >>> first = ChoiceCell(*place, 1, {"reference": 3.0, "a": 1.005, "b": 1.0})
        >>> second = ChoiceCell(*place, 9, {"reference": 3.0, "a": 1.0, "b": 2.0})
        >>> [order[0] for order in settled([first, second])]
        ['a', 'a']
    """
    good = [
        [
            name
            for name in cell.order
            if name == cell.winner
            or (
                cell.times[name] <= cell.times[cell.winner] * (1 + min(cell.margin, MARGINS["eager"]))
                and (name == REFERENCE or cell.ratio(name) < 1)
                and name not in cell.lost
            )
        ]
        for cell in cells
    ]
    winners: list[str] = []
    left = list(good)
    while left:  # greedy: the one that serves most of those that are left
        counts = Counter(name for names in left for name in names)
        winners.append(max(counts, key=lambda name: counts[name]))
        left = [names for names in left if winners[-1] not in names]
    orders = []
    for cell, names in zip(cells, good, strict=True):
        first = next(name for name in winners if name in names)
        orders.append((first, *(name for name in cell.order if name != first)))
    return orders


set_module("kernels_plugins", globals())
