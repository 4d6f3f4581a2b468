"""The result of a bisection, and the error where it has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels_core import KernelsError, Table, TableRow, Tabular, as_json, set_module

from .measure import Plain, Reading


class BisectError(KernelsError):
    """A bisection has no answer; the model is as before.

    Attributes:
        evaluation: The evaluation of the metric at which that turned out, counted from 1; 0 for none of them.
        paths: The modules that ran on their kernels in that evaluation.
    """

    def __init__(self, message: str, *, evaluation: int = 0, paths: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.evaluation = evaluation
        self.paths = tuple(paths)


@dataclass(frozen=True)
class Culprit:
    """A kernel that changes the metric, by itself or with others.

    Attributes:
        path: Its module, as in `module_paths`; for a decorated function, that of the calling module, a colon, and
            its name (`*:name` for all calls in compiled code).
        layer: The name of the layer in mappings.
        origin: The origin of the kernel: repository and commit, or class.
        metric: The metric with only this kernel on, and every other layer on its reference.
        change: The difference from the baseline.
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
        paths: The paths of the culprits; a single one for a kernel that is enough by itself.
        metric: The metric with only these kernels on.
        change: The difference from the baseline.
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
        sets: The culprits in minimal sets: those of one set change the metric together.
        baseline: The metric with every decorated layer on its reference.
        suspect: The metric of the model as it is.
        change: The difference between suspect and baseline.
        mended: The metric with all culprits on their reference, and the other kernels on.
        is_mended: Whether that is within the tolerance.
        tolerance: The change that is allowed, in words.
        noise: The largest difference between two evaluations of the same kernels.
        kernels: The number of kernels in use.
        evaluations: The number of evaluations of the metric.
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
        """The origins of the culprits, each once."""
        return tuple(dict.fromkeys(culprit.origin for culprit in self.culprits))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON; numbers that are not finite are text.

        Example:
            >>> BisectResult((), (), 1.0, 1.0, 0.0, 1.0, True, "0.1", 0.0, 3, 4).to_json(indent=None)[:35]
            '{"culprits": [], "sets": [], "basel'
        """
        return as_json({**vars(self), "ok": self.ok}, indent=indent)

    def as_table(self) -> Table:
        """Return the culprits, between the finding and the other numbers."""
        first, *rest = self._summary()
        rows = tuple(TableRow(_cells(culprit)) for culprit in self.culprits)
        columns = ("path", "layer", "origin", "metric", "change")
        return Table(columns, rows, first, "\n".join(rest), "green" if self.ok else "red")

    def _summary(self) -> Iterator[str]:
        baseline, suspect = Reading(self.baseline), Reading(self.suspect)
        change = f"a change of {self.change:.3g}, {self.tolerance} is allowed"
        here = f"{baseline} on references, {suspect} on kernels: {change}"
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


set_module("kernels_plugins", globals())
