"""The properties of numbers that a kernel may declare, and how findings about them stand in decisions and receipts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Numeric = Literal["deterministic", "batch_invariant", "recompute_equal"]
NUMERICS: tuple[Numeric, ...] = ("deterministic", "batch_invariant", "recompute_equal")
"""The properties of numbers.

`deterministic`: equal calls give equal bits, forward and backward. `batch_invariant`: the bits of a row do not depend
on the other rows, on their number, or on its place among them. `recompute_equal`: without gradients, recorded,
recomputed by a checkpoint and compiled, the forward gives equal bits.
"""


UNKNOWN = "not known: run verify(model, inputs, numerics=[...]), or kernels-core explain --numerics, to find it out"
"""The finding about a property where there is none. Findings are in the checks of a decision, under the name of the
property: `"yes: ..."`, `"no: ..."` or `"not known: ..."`."""


@dataclass(frozen=True)
class WantedNumerics:
    """The payload of a scope in which properties of numbers are found out at the first call of each implementation.

    Attributes:
        names: The properties.
        required: Whether an implementation without them is refused, too.
    """

    names: tuple[Numeric, ...]
    required: bool = True


def check_declared(kernel: object) -> str | None:
    """Return the mistake in the properties that a kernel declares, None if there is none."""
    for name in NUMERICS:
        if not isinstance(declared := getattr(kernel, name, False), bool):
            return f"its {name} is {declared!r}: write True or False"
    return None
