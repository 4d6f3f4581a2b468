"""The report of `verify`: a row for each comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kernels_core import KernelsError, Table, TableRow, Tabular, VerificationError, as_json, set_module

Verdict = Literal["ok", "wrong", "failed", "undecided", "refused", "skipped", "no kernel", "not called"]

FAILURES: tuple[Verdict, ...] = ("wrong", "failed", "undecided")
COMPARED: tuple[Verdict, ...] = ("ok", "wrong", "failed")
GAPS: tuple[Verdict, ...] = ("refused", "no kernel", "not called")
COLUMNS = ("path", "layer", "kernel", "mode", "dtype", "cases", "max", "mean", "ulps", "verdict")
_STYLES = {"ok": "green", "wrong": "red", "failed": "red", "undecided": "red"}


@dataclass(frozen=True)
class VerifyRow:
    """One comparison of a kernel with its reference, or the reason why there is none.

    Attributes:
        path: The path of the layer in the model.
        layer: Its name in mappings.
        kernel: The candidate; empty for a row that is about the layer.
        origin: The origin of the candidate, once it was loaded: repository and commit, or class.
        plugin: The plugin that offers it.
        device: Device of the call.
        dtype: That of the first input with floating numbers.
        mode: `"inference"` or `"training"`.
        case: The variation of the inputs; `"as given"` for those that were given or recorded.
        subject: The result that was compared: `"forward"`, `"gradient of parameter weight"`, `"changes"`; or the
            property of numbers that was found out, such as `"batch_invariant"`, of a kernel or of the reference.
        verdict: `"ok"`; `"wrong"`; `"failed"` where the kernel raised and the reference did not; `"undecided"`
            where the reference itself fails or varies; `"refused"` for a kernel that would not serve such calls;
            `"skipped"` for a case that does not apply; `"no kernel"` where none is offered; `"not called"` for a
            layer that the model did not call.
        reason: The reason for the verdict; empty for `"ok"`.
        max_abs: The largest error; measured from a float64 reference, where the layer allows one.
        mean_abs: The mean error.
        max_rel: The largest relative error.
        max_ulps: The largest error, in units in the last place.
        excess: The largest error, or their mean, as a multiple of the tolerance.
        own_error: The largest error of the reference in this dtype; None without a float64 reference.
    """

    path: str
    layer: str
    verdict: Verdict
    kernel: str = ""
    origin: str = ""
    plugin: str = ""
    device: str = ""
    dtype: str = ""
    mode: str = ""
    case: str = ""
    subject: str = ""
    reason: str = ""
    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    max_ulps: float | None = None
    excess: float | None = None
    own_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the verdict is no failure."""
        return self.verdict not in FAILURES

    def __str__(self) -> str:
        """One line: layer, kernel, inputs, verdict and reason."""
        where = f"{self.path or '(the layer)'} ({self.layer})"
        how = ", ".join(part for part in (self.mode, self.dtype, self.case, self.subject) if part)
        kernel = f", {self.origin or self.kernel}" if self.kernel else ""
        return f"{where}{kernel}{f', {how}' if how else ''}: {self.verdict}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class VerifyReport(Tabular):
    """The comparisons that `verify` made.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        rows: A row for each comparison.
    """

    rows: tuple[VerifyRow, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether no row is a failure: wrong, failed or undecided."""
        return not self.failures

    @property
    def failures(self) -> tuple[VerifyRow, ...]:
        """The rows whose verdict is a failure."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def gaps(self) -> tuple[VerifyRow, ...]:
        """The rows of kernels and layers without any comparison: refused in every mode, no kernel, or not called.

        Example:
            >>> VerifyReport((VerifyRow("mlp", "Mlp", "not called"),)).gaps[0].path
            'mlp'
        """
        compared = {(row.path, row.kernel) for row in self.rows if row.verdict in COMPARED}
        return tuple(row for row in self.rows if row.verdict in GAPS and (row.path, row.kernel) not in compared)

    def raise_for_failures(self) -> VerifyReport:
        """Raise if any row is a failure.

        Returns:
            The report itself.

        Raises:
            VerificationError: With the rows that are.

        Example:
            >>> VerifyReport().raise_for_failures().ok
            True
        """
        if failures := self.failures:
            lines = "\n".join(f"  {row}" for row in failures[:20])
            more = f"\n  and {len(failures) - 20} more" if len(failures) > 20 else ""
            raise VerificationError(
                f"{len(failures)} of {len(self.rows)} checks failed:\n{lines}{more}\n"
                "Do not use these kernels for such calls: fix them, or take them out of the mapping.",
                rows=failures,
            )
        return self

    def to_json(self) -> str:
        """Return the rows as JSON; errors that are not finite are strings.

        Example:
            >>> VerifyReport().to_json()
            '{"ok": true, "rows": []}'
        """
        rows = [{**vars(row), "ok": row.ok} for row in self.rows]
        return as_json({"ok": self.ok, "rows": rows}, indent=2 if rows else None)

    def plot(self, path: str | Path) -> Path:
        """Draw the distribution of the errors, as multiples of the tolerance, per kernel and dtype.

        Args:
            path: Where to write the picture; its ending chooses the format.

        Returns:
            The path.

        Raises:
            KernelsError: If matplotlib is not installed, or nothing was compared.
        """
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            if row.excess is not None:
                groups.setdefault(f"{row.layer}: {row.origin}\n{row.dtype}", []).append(row.excess)
        if not groups:
            raise KernelsError("There is nothing to plot: no kernel was compared with its reference.")
        figure = new_figure(1.5 + 0.5 * len(groups))
        axes = figure.subplots()
        for place, (_, values) in enumerate(sorted(groups.items())):
            shown = [min(max(value, 1e-6), 1e6) for value in values]
            colours = ["tab:green" if value <= 1 else "tab:red" for value in shown]
            axes.scatter(shown, [place] * len(shown), c=colours, alpha=0.6, s=18)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("largest error, or mean of the errors, as a multiple of the tolerance")
        axes.set_yticks(range(len(groups)), sorted(groups), fontsize=8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        figure.savefig(Path(path))
        return Path(path)

    def as_table(self) -> Table:
        """Return a row for each layer, kernel, mode and dtype, with its faults as notes."""
        if not self.rows:
            return Table(COLUMNS, summary="no decorated layer was called; adopt(model) makes layers dispatch")
        return Table(COLUMNS, tuple(self._groups()), summary=self.summary)

    @property
    def summary(self) -> str:
        """One line: how many comparisons of how many kernels, and how they ended."""
        compared = len({row.origin for row in self.rows if row.verdict in COMPARED and row.kernel})
        counted = Counter(row.verdict for row in self.rows if row.verdict not in ("no kernel", "not called"))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
        if not compared:
            return f"no kernel was compared{f': {verdicts}' if verdicts else ''}"
        return f"{compared} kernel{'s' * (compared != 1)} compared: {verdicts}"

    def _groups(self) -> Iterator[TableRow]:
        """Yield a row for all comparisons of one layer, kernel, mode and dtype."""
        groups: dict[tuple[str, ...], list[VerifyRow]] = {}
        for row in self.rows:
            if row.verdict != "skipped":
                group = (row.path, row.layer, row.origin or row.kernel, row.mode, row.dtype)
                groups.setdefault(group, []).append(row)
        for key, rows in groups.items():
            worst = max(rows, key=lambda row: FAILURES[::-1].index(row.verdict) + 1 if not row.ok else 0).verdict
            known = [
                [value for row in rows if (value := getattr(row, name)) is not None]
                for name in ("max_abs", "mean_abs", "max_ulps")
            ]
            numbers = [f"{max(values):.3g}" if values else "" for values in known]
            tried = len({row.case for row in rows if row.case})
            label = " ".join(filter(None, key))
            yield TableRow((*key, tried, *numbers, worst), _STYLES.get(worst, "yellow"), tuple(_remarks(rows)), label)


def new_figure(height: float) -> Any:
    """Return an empty figure of matplotlib, of a height in inches; an error of ours where that is not installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise KernelsError("A plot needs matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(9, height), layout="constrained")


def _remarks(rows: list[VerifyRow]) -> Iterator[str]:
    """Yield a line for each fault, with the first case that shows it."""
    faults: dict[tuple[str, str], list[VerifyRow]] = {}
    for row in rows:
        if row.reason:
            faults.setdefault((row.verdict, row.subject), []).append(row)
    for (_, subject), alike in faults.items():
        count = len(alike) - 1
        others = f", and in {count} other {'case' if count == 1 else 'cases'}" if count else ""
        place = ", ".join(part for part in (alike[0].case, subject) if part)
        yield f"{place}{others}: {alike[0].reason}" if place else alike[0].reason


set_module("kernels_plugins", globals())
