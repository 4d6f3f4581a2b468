"""What `verify` found: a row for each comparison."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kernels_core import KernelsError, VerificationError

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "wrong", "failed", "undecided", "refused", "skipped", "no kernel", "not called"]

FAILURES: tuple[Verdict, ...] = ("wrong", "failed", "undecided")
COMPARED: tuple[Verdict, ...] = ("ok", "wrong", "failed")
GAPS: tuple[Verdict, ...] = ("refused", "no kernel", "not called")
COLUMNS = ("path", "layer", "kernel", "mode", "dtype", "cases", "max", "mean", "ulps", "verdict")
_STYLES = {"ok": "green", "wrong": "red", "failed": "red", "undecided": "red"}


@dataclass(frozen=True)
class VerifyRow:
    """One comparison of a kernel with its reference, or why there is none.

    Attributes:
        path: Where the layer is in the model.
        layer: Its name in mappings.
        kernel: The candidate; empty where it is about the layer.
        origin: Where the candidate came from, once it was loaded: repository and commit, or class.
        plugin: Who offers it.
        device: Device of the call.
        dtype: Of the first input with floating numbers.
        mode: `"inference"` or `"training"`.
        case: What is special about the inputs; `"as given"` for those that were given or recorded.
        subject: What was compared: `"forward"`, `"gradient of parameter weight"`, `"changes"`.
        verdict: `"ok"`; `"wrong"`; `"failed"` where the kernel raised and the reference did not; `"undecided"`
            where the reference cannot tell; `"refused"` for a kernel that would not serve such calls;
            `"skipped"` for a case that does not apply; `"no kernel"` where none is offered; `"not called"` for a
            layer that the model did not call.
        reason: Why; empty for `"ok"`.
        max_abs: The largest error; measured from a float64 reference, where the layer allows one.
        mean_abs: The mean error.
        max_rel: The largest relative error.
        max_ulps: The largest error, in units in the last place.
        excess: The largest error, or their mean, in units of what is allowed.
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
        """Whether nothing is wrong with it."""
        return self.verdict not in FAILURES

    def __str__(self) -> str:
        """One line: where, what, and why."""
        where = f"{self.path or '(the layer)'} ({self.layer})"
        how = ", ".join(part for part in (self.mode, self.dtype, self.case, self.subject) if part)
        kernel = f", {self.origin or self.kernel}" if self.kernel else ""
        return f"{where}{kernel}{f', {how}' if how else ''}: {self.verdict}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        rows: A row for each comparison.
    """

    rows: tuple[VerifyRow, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, no kernel failed, and no reference was unable to tell."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[VerifyRow, ...]:
        """The rows that say what is wrong."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def gaps(self) -> tuple[VerifyRow, ...]:
        """The rows of kernels and layers of which nothing was compared: refused for every mode, none there, not called.

        Example:
            >>> VerifyReport((VerifyRow("mlp", "Mlp", "not called"),)).gaps[0].path
            'mlp'
        """
        compared = {(row.path, row.kernel) for row in self.rows if row.verdict in COMPARED}
        return tuple(row for row in self.rows if row.verdict in GAPS and (row.path, row.kernel) not in compared)

    def raise_for_failures(self) -> VerifyReport:
        """Raise if anything is wrong.

        Returns:
            The report itself.

        Raises:
            VerificationError: With the rows that say so.

        Example:
            >>> VerifyReport().raise_for_failures().ok
            True
        """
        failures = self.failures
        if failures:
            lines = "\n".join(f"  {row}" for row in failures[:20])
            more = f"\n  and {len(failures) - 20} more" if len(failures) > 20 else ""
            raise VerificationError(
                f"{len(failures)} of {len(self.rows)} checks failed:\n{lines}{more}\n"
                "Do not use these kernels for such calls: mend them, or take them out of the mapping.",
                rows=failures,
            )
        return self

    def to_json(self) -> str:
        """Return the rows as JSON; errors that are not finite are strings.

        Example:
            >>> VerifyReport().to_json()
            '{"ok": true, "rows": []}'
        """
        rows = [{**{k: _plain(v) for k, v in vars(row).items()}, "ok": row.ok} for row in self.rows]
        return json.dumps({"ok": self.ok, "rows": rows}, indent=2 if rows else None)

    def plot(self, path: str | Path) -> Path:
        """Draw how the errors are distributed, in units of what is allowed, per kernel and dtype.

        Args:
            path: Where to write the picture; its ending chooses the format.

        Returns:
            The path.

        Raises:
            KernelsError: If matplotlib is not installed, or nothing was compared.
        """
        try:
            from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise KernelsError("A plot needs matplotlib, which is not installed: pip install matplotlib") from error
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            if row.excess is not None:
                groups.setdefault(f"{row.layer}: {row.origin}\n{row.dtype}", []).append(row.excess)
        if not groups:
            raise KernelsError("There is nothing to plot: no kernel was compared with its reference.")
        figure = Figure(figsize=(9, 1.5 + 0.5 * len(groups)), layout="constrained")
        axes = figure.subplots()
        for place, (_, values) in enumerate(sorted(groups.items())):
            shown = [min(max(value, 1e-6), 1e6) for value in values]
            colours = ["tab:green" if value <= 1 else "tab:red" for value in shown]
            axes.scatter(shown, [place] * len(shown), c=colours, alpha=0.6, s=18)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("largest error, or mean of the errors, in units of what is allowed")
        axes.set_yticks(range(len(groups)), sorted(groups), fontsize=8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        figure.savefig(Path(path))
        return Path(path)

    def __str__(self) -> str:
        """A plain table: a line for each layer, kernel, mode and dtype, with what is wrong below it."""
        if not self.rows:
            return "no decorated layer was called"
        groups = list(self._groups())
        table = [COLUMNS, *(cells for cells, _, _ in groups)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for number, cells in enumerate(table):
            lines.append("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
            lines += ["    " + remark for remark in groups[number - 1][2]] if number else []
        return "\n".join([*lines, self.summary])

    def __rich__(self) -> Table:
        """A table with colours."""
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold", caption=self.summary)
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for cells, verdict, remarks in self._groups():
            table.add_row(*map(Text, cells), style=_STYLES.get(verdict, "yellow"))
            for remark in remarks:
                table.add_row("", "", Text(remark), *[""] * (len(COLUMNS) - 3), style="dim")
        return table

    @property
    def summary(self) -> str:
        """One line: how many comparisons of how many kernels, and how they ended."""
        compared = {row.origin for row in self.rows if row.verdict in COMPARED}
        counts = Counter(row.verdict for row in self.rows)
        told = ", ".join(
            f"{count} {verdict}" for verdict, count in counts.items() if verdict not in ("no kernel", "not called")
        )
        if not compared:
            return f"no kernel was compared{f': {told}' if told else ''}"
        return f"{len(compared)} {'kernel' if len(compared) == 1 else 'kernels'} compared: {told}"

    def _groups(self) -> Iterator[tuple[tuple[str, ...], Verdict, list[str]]]:
        """Yield cells, verdict and remarks for all rows of one layer, kernel, mode and dtype."""
        groups: dict[tuple[str, ...], list[VerifyRow]] = {}
        for row in self.rows:
            if row.verdict != "skipped":
                group = (row.path, row.layer, row.origin or row.kernel, row.mode, row.dtype)
                groups.setdefault(group, []).append(row)
        for key, rows in groups.items():
            worst = max(rows, key=lambda row: FAILURES[::-1].index(row.verdict) + 1 if not row.ok else 0)
            numbers = [_largest(getattr(row, name) for row in rows) for name in ("max_abs", "mean_abs", "max_ulps")]
            tried = str(len({row.case for row in rows if row.case}))
            yield (*key, tried, *numbers, worst.verdict), worst.verdict, list(_remarks(rows))


def _remarks(rows: list[VerifyRow]) -> Iterator[str]:
    """Yield a line for each thing that is wrong, with the first case in which it is."""
    told: dict[tuple[str, str], list[VerifyRow]] = {}
    for row in rows:
        if row.reason:
            told.setdefault((row.verdict, row.subject), []).append(row)
    for (_, subject), alike in told.items():
        count = len(alike) - 1
        others = f", and in {count} other {'case' if count == 1 else 'cases'}" if count else ""
        what = ", ".join(part for part in (alike[0].case, subject) if part)
        yield f"{what}{others}: {alike[0].reason}" if what else alike[0].reason


def _largest(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.3g}" if known else ""


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
