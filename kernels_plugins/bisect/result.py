"""What a bisection found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .measure import Plain, Reading

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("path", "layer", "origin", "metric", "change")


@dataclass(frozen=True)
class Culprit:
    """A kernel that changes the metric, alone or with others.

    Attributes:
        path: Its module, as in `named_modules`; for a decorated function, that of the calling module, a colon, and
            its name (`*:name` for all calls in compiled code).
        layer: The name of the layer in mappings.
        origin: Where the kernel comes from.
        metric: The metric with only this kernel on, and every other layer on its reference.
        change: How far that is from the baseline.
        also: Other paths of the same module.
    """

    path: str
    layer: str
    origin: str
    metric: Plain
    change: float
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class CulpritSet:
    """Kernels that change the metric beyond the tolerance together, and no fewer of them do.

    Attributes:
        paths: Of the culprits; a single one for a kernel that is enough by itself.
        metric: The metric with only these kernels on.
        change: How far that is from the baseline.
    """

    paths: tuple[str, ...]
    metric: Plain
    change: float


@dataclass(frozen=True)
class BisectResult:
    """Which kernels of a model change a metric beyond a tolerance.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        culprits: The kernels, in the order of the model; none if the suspect is within the tolerance.
        sets: Which of them do it alone, and which together.
        baseline: The metric with every decorated layer on its reference.
        suspect: The metric of the model as it is.
        change: How far the suspect is from the baseline.
        mended: The metric with all culprits on their reference, and the other kernels on.
        is_mended: Whether that is within the tolerance.
        tolerance: How far the metric may change, in words.
        noise: The largest difference that was seen between two evaluations of the same thing.
        kernels: How many kernels were in use.
        evaluations: How often the metric was evaluated.
    """

    culprits: tuple[Culprit, ...]
    sets: tuple[CulpritSet, ...]
    baseline: Plain
    suspect: Plain
    change: float
    mended: Plain
    is_mended: bool
    tolerance: str
    noise: float
    kernels: int
    evaluations: int

    @property
    def ok(self) -> bool:
        """Whether the metric stays within the tolerance."""
        return not self.culprits

    @property
    def origins(self) -> tuple[str, ...]:
        """Where the culprits come from, each kernel once."""
        return tuple(dict.fromkeys(culprit.origin for culprit in self.culprits))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON; what is no finite number is text.

        Example:
            >>> BisectResult((), (), 1.0, 1.0, 0.0, 1.0, True, "0.1", 0.0, 3, 4).to_json(indent=None)[:35]
            '{"culprits": [], "sets": [], "basel'
        """
        plain = {
            **vars(self),
            "culprits": [vars(culprit) for culprit in self.culprits],
            "sets": [vars(group) for group in self.sets],
            "ok": self.ok,
        }
        return json.dumps(_finite(plain), indent=indent)

    def __str__(self) -> str:
        """The culprits as a plain table, and a summary."""
        lines = list(self._summary())
        if self.culprits:
            rows = [COLUMNS, *map(_cells, self.culprits)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines[1:1] = [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
            ]
        return "\n".join(lines)

    def __rich__(self) -> Group:
        """A table with colours."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        first, *rest = self._summary()
        summary = Text(first, style="red" if self.culprits else "green"), Text("\n".join(rest))
        if not self.culprits:
            return Group(*summary)
        table = Table(header_style="bold")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for culprit in self.culprits:
            table.add_row(*map(Text, _cells(culprit)))
        return Group(summary[0], table, summary[1])

    def _summary(self) -> Iterator[str]:
        baseline, suspect = Reading(self.baseline), Reading(self.suspect)
        here = f"{baseline} on references, {suspect} on kernels: a change of {self.change:.3g}"
        here += f", {self.tolerance} is allowed"
        if not self.culprits:
            yield f"no culprit: within tolerance ({here})"
        else:
            count = len(self.culprits)
            yield f"{count} of {self.kernels} kernels change{'s' * (count == 1)} the metric ({here})"
            for group in self.sets:
                if len(group.paths) > 1:
                    yield f"together: {', '.join(group.paths)}: {Reading(group.metric)}, a change of {group.change:.3g}"
            mended = "within tolerance" if self.is_mended else "still beyond tolerance: errors cancel each other here"
            yield f"with their references instead: {Reading(self.mended)}, {mended}"
        yield f"{self.evaluations} evaluations" + (f", which differ by up to {self.noise:.3g}" if self.noise else "")


def _cells(culprit: Culprit) -> tuple[str, ...]:
    path = " = ".join((culprit.path or "(the model)", *culprit.also))
    return path, culprit.layer, culprit.origin, str(Reading(culprit.metric)), f"{culprit.change:.3g}"


def _finite(value: Any) -> Any:
    """Write NaN and infinity as text: JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
