"""The tolerance of each dtype.

Tolerances are those of `torch.testing`: the error that is allowed in a single number. They would let a kernel pass
whose numbers are all one percent too large in bfloat16, so the mean of the errors has a limit, too: rounding errors
have either sign, and their mean over many numbers must be near zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from kernels_core import ArgumentError, ArgumentTypeError

Tolerance = tuple[float, float]
Tolerances = Tolerance | Mapping[torch.dtype, Tolerance]

TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float16: (4e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex32: (4e-3, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
"""Relative and absolute, as in `torch.testing.assert_close`; other floating dtypes: their eps; integers: none.

But for float16, the relative one there is a single unit in the last place. Two right kernels differ by more,
where one keeps an intermediate result in float32 and the other does not: it is four here.
"""

OWN_RMS, OWN_MAX = 8.0, 3.0
"""Further allowed errors of a number, as multiples of the root mean square, and the largest, of the reference's own."""

LOW_EPS = 1e-4
"""Dtypes with a larger eps round so much that both sides are allowed their error, where only both are known."""

SIGNIFICANT = 6.0
"""How many times its own uncertainty the mean of the errors must be, to be more than chance."""


def tolerance_of(dtype: torch.dtype, tolerances: Tolerances | None = None) -> Tolerance:
    """Return the relative and absolute tolerance of a dtype."""
    if isinstance(tolerances, tuple):
        return tolerances
    if tolerances is not None and dtype in tolerances:
        return tolerances[dtype]
    if dtype in TOLERANCES:
        return TOLERANCES[dtype]
    return (torch.finfo(dtype).eps, 1e-5) if dtype.is_floating_point else (0.0, 0.0)


def check_tolerances(tolerances: Any) -> None:
    """Refuse invalid tolerances before anything runs."""
    if tolerances is None:
        return
    for dtype, pair in tolerances.items() if isinstance(tolerances, Mapping) else [(torch.float32, tolerances)]:
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(number, int | float) for number in pair)
        if not is_pair or not isinstance(dtype, torch.dtype):
            raise ArgumentTypeError(
                f"tolerances are (relative, absolute), or a dict of these by dtype, not {tolerances!r}."
            )
        if not all(number >= 0 for number in pair):
            raise ArgumentError(f"tolerances are {tolerances!r}: each is the allowed error of a number, 0 or more.")


class Yardstick:
    """The allowed difference between two tensors of a dtype and shape."""

    def __init__(self, tensor: torch.Tensor, tolerance: Tolerance) -> None:
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self.rtol, self.atol = tolerance
        # Of the dtype; 0 for integers.
        self.eps = torch.finfo(tensor.dtype).eps if tensor.dtype.is_floating_point or tensor.is_complex() else 0.0
        # Errors of a row may go one way.
        self.rows = max(1, tensor.numel() // max(1, tensor.shape[-1] if tensor.dim() else 1))

    def relative(self, *, exact: bool) -> float:
        """Return the relative tolerance, from numbers that are exact, or err themselves."""
        return self.rtol * (2 if not exact and self.eps > LOW_EPS else 1)

    def bias(
        self,
        count: float,
        bias: float,
        along: float,
        size: float,
        rms: float,
        own: tuple[float, float, float] | None = None,
    ) -> tuple[float, str]:
        """Return how far the errors lean to one side, in units of the allowed mean, and to which.

        Up, down, away from zero or towards it. A number that a row shares, such as a norm that was rounded, moves all
        of the row to one side; over many rows, these moves have either sign. The reference's own errors are known
        only with a float64 reference.
        """
        if not self.eps:
            return 0.0, ""
        step = max(0.75 * self.eps, self.rtol / 4) * (1 + (1.5 if own is None else 0.5) / math.sqrt(self.rows))
        own_bias, own_along, own_rms = own or (0.0, 0.0, 0.0)
        found = []
        for mean, reference, sides in (
            (bias, own_bias, ("high", "low")),
            (along, own_along, ("large in magnitude", "small in magnitude")),
        ):
            # Rounding may make the difference negative.
            spread = max(math.sqrt(max(rms * rms - mean * mean, 0.0)), own_rms)
            chance = SIGNIFICANT * spread / math.sqrt(count)
            allowed = step * size + self.atol + 2 * abs(reference) + chance  # the reference may lean, too
            reason = f"biased: too {sides[mean < 0]} by {abs(mean):.3g} on average, where rounding goes either way"
            found.append((abs(mean) / allowed if mean and allowed else math.inf if mean else 0.0, reason))
        return max(found, key=lambda one: one[0])


def widest(tensor: torch.Tensor) -> torch.dtype:
    """Return the widest floating dtype on the device of a tensor."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares, in the widest dtype, without a copy."""
    return cast(torch.Tensor, torch.linalg.vector_norm(tensor, dtype=widest(tensor)))
