"""What a bisection found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels_core import Table, TableRow, Tabular, as_json

from .measure import Plain, Reading

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
class BisectResult(Tabular):
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
        return as_json({**vars(self), "ok": self.ok}, indent=indent)

    def as_table(self) -> Table:
        """Return the culprits, between the finding and the other numbers."""
        first, *rest = self._summary()
        rows = tuple(TableRow(_cells(culprit)) for culprit in self.culprits)
        return Table(COLUMNS, rows, first, "\n".join(rest), "green" if self.ok else "red")

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
