"""The numbers that a metric returns, and the tolerance between two of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels_core import ArgumentError, ArgumentTypeError

Plain = float | tuple[float, ...] | dict[str, float]
"""A reading as the metric returned it."""


@dataclass(frozen=True)
class Reading:
    """The numbers that a metric returned: one, a tuple of them, or numbers by name."""

    plain: Plain

    @classmethod
    def of(cls, answer: object) -> Reading:
        """Read the answer of a metric; `ArgumentTypeError` if that is no number, and no dict or tuple of numbers.

        Example:
            >>> Reading.of({"loss": torch.tensor(1.5)}).plain
            {'loss': 1.5}
        """
        if isinstance(answer, Mapping) and answer:
            return cls({str(name): _number(value) for name, value in answer.items()})
        if isinstance(answer, tuple | list) and answer:
            return cls(tuple(map(_number, answer)))
        return cls(_number(answer))

    @property
    def numbers(self) -> Mapping[str, float]:
        """The numbers by name, or by place; a single one has no name."""
        if isinstance(self.plain, dict):
            return self.plain
        if isinstance(self.plain, tuple):
            return {str(place): value for place, value in enumerate(self.plain)}
        return {"": self.plain}

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return all(map(math.isfinite, self.numbers.values()))

    def change_from(self, other: Reading) -> float:
        """Return the largest difference between numbers of one name; infinite where only one is NaN."""
        return max(_gap(value, other.numbers[name]) for name, value in self.numbers.items())

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.6g}".strip() for name, value in self.numbers.items())


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ArgumentTypeError(
                f"a tensor of shape {tuple(value.shape)}, where a single number is wanted: return tensor.mean(), "
                "or the largest difference from what is expected"
            )
        if value.is_meta:
            raise ArgumentTypeError(
                "a tensor on the meta device, which has no number: move model and inputs to another"
            )
        value = value.detach()
    if hasattr(type(value), "__float__") and not (isinstance(value, torch.Tensor) and value.is_complex()):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass  # such as an array of several numbers: refused below
    raise ArgumentTypeError(
        f"{value!r}, which is no number: return a float, a tensor of no dimensions, or a dict or tuple of those"
    )


def _gap(value: float, other: float) -> float:
    if value == other or (math.isnan(value) and math.isnan(other)):
        return 0.0
    gap = abs(value - other)
    return math.inf if math.isnan(gap) else gap


@dataclass(frozen=True)
class Tolerance:
    """How far each number may be from the baseline: an absolute part, and a share of the baseline."""

    absolute: float
    relative: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.absolute), ("relative", self.relative)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ArgumentTypeError(f"{name} is a number such as 1e-3, not {value!r}.")
            if not 0 <= value <= sys.float_info.max:
                raise ArgumentError(f"{name} is {value}: it is how far the metric may change, 0 or more.")

    def is_exceeded(self, reading: Reading, baseline: Reading) -> bool:
        """Whether a number of a reading is further from that of the baseline than allowed.

        Example:
            >>> Tolerance(0.1).is_exceeded(Reading(1.2), Reading(1.0))
            True
        """
        return any(
            _gap(value, reading.numbers[name])
            > self.absolute + (self.relative * abs(value) if math.isfinite(value) else 0.0)
            for name, value in baseline.numbers.items()
        )

    def __str__(self) -> str:
        parts = [f"{self.absolute:g}"] if self.absolute or not self.relative else []
        return " + ".join([*parts, *([f"{self.relative:g} of the baseline"] if self.relative else [])])
