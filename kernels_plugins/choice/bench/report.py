"""`BenchReport`: a row for each candidate, size, mode and context; as text, JSON, Markdown, a page and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kernels_core import Bars, KernelsError, Page, Section, Table, TableRow, as_json, set_module, visible

from ...oracle.report import new_figure
from ..cell import REFERENCE
from ..page import short_name
from ..race import FAULTS

if TYPE_CHECKING:
    from rich.console import Group

_COLUMNS = ("rows", "candidate", "us", "of ref.", "GB/s", "of copy", "verified")
_LONGEST = 4.0
"""The length of the longest bar, as a multiple of that of the reference: beside one of 200, all others are nothing."""

_NUMBERS = ("rows", "us", "of ref.", "GB/s", "of copy")
LEGEND = (
    "us is the time of a call; of ref. is that as a multiple of the time of the reference, the layer's own forward.\n"
    "GB/s counts inputs, parameters and outputs once, in training also gradients of outputs, inputs and parameters; "
    "of copy is the share of the rate at which the device copies as many bytes."
)


@dataclass(frozen=True)
class BenchRow:
    """One candidate on calls of one size, in one mode and context.

    Attributes:
        layer: The layer name.
        mode: `"inference"`, or `"training"` with the backward.
        context: `"eager"`, `"captured"` or `"compiled"`, as of a `ChoiceCell`.
        dtype: That of the first tensor, such as `"bfloat16"`.
        width: The last dimension of the first tensor.
        rows: The product of its other dimensions.
        candidate: Its name; `"reference"` is the layer's own forward.
        seconds: The time of a call; None if it was not timed. Only candidates that are right are timed.
        ratio: The same, as a multiple of the time of the reference.
        bytes: The bytes of inputs, parameters and outputs, and in training of their gradients.
        copy: The seconds in which the device copies as many bytes: reads half of them, and writes the other half.
        reason: Why it was not timed.
    """

    layer: str
    mode: str
    context: str
    dtype: str
    width: int
    rows: int
    candidate: str
    seconds: float | None = None
    ratio: float | None = None
    bytes: int = 0
    copy: float | None = None
    reason: str = ""

    @property
    def size(self) -> tuple[str, str, str, int, int]:
        """Equal for all candidates and contexts of a call."""
        return self.layer, self.mode, self.dtype, self.width, self.rows

    @property
    def title(self) -> str:
        """Its layer and its way of being called, for all sizes."""
        return f"{self.layer}, {self.dtype}, {self.width} wide: {self.mode}, {self.context}"

    @property
    def rate(self) -> float | None:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds else None

    @property
    def share(self) -> float | None:
        """The rate, as a multiple of that of the copy."""
        return self.copy / self.seconds if self.seconds and self.copy else None

    @property
    def ok(self) -> bool:
        """Whether the candidate is not at fault: not wrong, raised no error, ended no process."""
        return self.candidate == REFERENCE or not self.reason.startswith(FAULTS)


@dataclass(frozen=True)
class BenchReport:
    """The times that `bench` took.

    `str` gives plain tables, `rich.print` some with colours.

    Attributes:
        rows: A row for each candidate, size, mode and context.
        machine: The device and the versions.

    Example:
        >>> row = BenchRow("Norm", "inference", "eager", "float32", 64, 2, "acme.Norm", 2e-6, 0.5, 1024, 1e-6)
        >>> print(BenchReport((row,), {"device": "cpu"}))
        Norm, float32, 64 wide: inference, eager
        rows  candidate  us  of ref.   GB/s  of copy  verified
           2  Norm        2     0.50  0.512     0.50  yes
        <BLANKLINE>
        1 timed, 0 at fault; cpu
    """

    rows: tuple[BenchRow, ...]
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no candidate is at fault."""
        return all(row.ok for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many candidates were timed, and where."""
        timed, failed = (sum(row.seconds is not None for row in self.rows), sum(not row.ok for row in self.rows))
        where = [self.machine[name] for name in ("model", "device") if self.machine.get(name)][:1]
        torch = [f"torch {self.machine['torch']}"] if "torch" in self.machine else []
        return f"{timed} timed, {failed} at fault; {', '.join(where + torch)}"

    def __str__(self) -> str:
        """Plain tables."""
        return "\n\n".join([*map(str, self._tables()), self.summary])

    def __rich__(self) -> Group:
        """Tables with colours."""
        from rich.console import Group
        from rich.text import Text

        return Group(*(part for table in self._tables() for part in (table, Text())), Text(visible(self.summary)))

    def to_json(self) -> str:
        """Return the rows as JSON, with rates, shares and the machine.

        Example:
            >>> BenchReport(()).to_json().splitlines()[1]
            '  "ok": true,'
        """
        rows = [{**vars(row), "rate": row.rate, "share": row.share, "ok": row.ok} for row in self.rows]
        return as_json({"ok": self.ok, "machine": self.machine, "rows": rows})

    def to_markdown(self) -> str:
        r"""Return tables in Markdown.

        Example:
            >>> BenchReport(()).to_markdown()
            '0 timed, 0 at fault;\n'
        """
        parts = [part for table in self._tables() for part in _markdown(table)]
        return "\n".join([*parts, _escaped(self.summary), ""])

    def as_page(self) -> Page:
        """Return the page: bars and a table for each layer and way of being called."""
        parts: list[object] = [
            Section(table.title, [Bars(list(self._bars(table.title)), line=1), _untitled(table)])
            for table in self._tables()
        ]
        facts = {name: value for name, value in self.machine.items() if value}
        machine = [Section("Measured on", [facts])] if facts else []
        return Page("Benchmark of layers", [*parts, *machine], f"{self.summary}\n{LEGEND}")

    def to_html(self) -> str:
        """Return the page as one file.

        Example:
            >>> BenchReport(()).to_html()[:15]
            '<!doctype html>'
        """
        return self.as_page().to_html()

    def _repr_html_(self) -> str:
        return self.as_page()._repr_html_()

    def to_svg(self) -> str:
        """Return a picture: a bar for each time, as a multiple of that of the reference.

        Example:
            >>> BenchReport(()).to_svg()[:4]
            '<svg'
        """
        bars = [bar for title in self._groups() for bar in (TableRow((title, None)), *self._bars(title))]
        return Bars(bars, title="Times, as multiples of that of the reference", line=1).to_svg()

    def plot(self, path: str | Path) -> Path:
        """Draw the rate of each candidate over the number of rows, and that of a copy.

        Args:
            path: Where to write the picture; its ending chooses the format.

        Returns:
            The path.

        Raises:
            KernelsError: If matplotlib is not installed, or nothing was timed.
        """
        groups = {title: rows for title, rows in self._groups().items() if any(row.rate for row in rows)}
        if not groups:
            raise KernelsError("There is nothing to plot: no candidate was timed.")
        figure = new_figure(1 + 3 * len(groups))
        for axes, (title, rows) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
            for name, shown in _names(rows).items():
                points = [(row.rows, row.rate / 1e9) for row in rows if row.candidate == name and row.rate]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=shown)
            copies = sorted({(row.rows, row.bytes / row.copy / 1e9) for row in rows if row.copy})
            axes.plot(*zip(*copies, strict=True), linestyle="--", color="black", label="copy")
            axes.set(title=title, xlabel="rows", ylabel="GB/s", xscale="log", yscale="log")
            axes.legend(fontsize=8)
        figure.savefig(Path(path))
        return Path(path)

    # --- Groups ----------------------------------------------------------------------------------

    def _groups(self) -> dict[str, list[BenchRow]]:
        """Return the rows of each layer and way of being called; the contexts of all sizes together."""
        groups: dict[str, list[BenchRow]] = {}
        for row in self.rows:
            groups.setdefault(row.title, []).append(row)
        return {title: sorted(rows, key=lambda row: row.rows) for title, rows in groups.items()}

    def _tables(self) -> Iterator[Table]:
        for title, rows in self._groups().items():
            names, shown = _names(rows), []
            explained: set[tuple[str, str]] = set()
            for row in rows:
                name = names[row.candidate]
                new = row.reason and (row.candidate, row.reason) not in explained
                explained.add((row.candidate, row.reason))
                verified = "" if row.candidate == REFERENCE else "yes" if row.seconds else "no"
                cells = (row.rows, name, *_numbers(row), verified)
                shown.append(TableRow(cells, _style(row), [row.reason] if new else (), name))
            yield Table(_COLUMNS, shown, title, right=_NUMBERS)

    def _bars(self, title: str) -> Iterator[TableRow]:
        rows = self._groups()[title]
        names = _names(rows)
        for row in rows:
            if row.seconds is not None and row.ratio is not None:
                label = f"{row.rows} row{'s' * (row.rows != 1)}: {names[row.candidate]}"
                length = min(row.ratio, _LONGEST)
                yield TableRow((label, length, f"{_number(row.seconds * 1e6)} us ({row.ratio:.2f})"), _style(row))


def _names(rows: Sequence[BenchRow]) -> dict[str, str]:
    """Return how to show each candidate: by its short name, unless another has the same."""
    names = dict.fromkeys(row.candidate for row in rows)
    short = [short_name(name) for name in names]
    return {name: short_name(name) if short.count(short_name(name)) == 1 else name for name in names}


def _numbers(row: BenchRow) -> tuple[str, ...]:
    if row.seconds is None or row.rate is None:
        return ("",) * 4
    share = "" if row.share is None else f"{row.share:.2f}"
    return _number(row.seconds * 1e6), f"{row.ratio:.2f}", _number(row.rate / 1e9), share


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _style(row: BenchRow) -> str:
    if row.candidate == REFERENCE:
        return "dim"
    return "red" if not row.ok else "green" if row.ratio is not None and row.ratio < 1 else "yellow"


def _untitled(table: Table) -> Table:
    return Table(table.columns, table.rows, right=table.right)


def _markdown(table: Table) -> Iterator[str]:
    yield from (f"### {_escaped(table.title)}", "", f"| {' | '.join(table.columns)} |")
    yield f"|{'|'.join('---:' if column in table.right else '---' for column in table.columns)}|"
    for row in table.rows:
        yield f"| {' | '.join(map(_escaped, row.texts(', ')))} |"
    yield ""
    notes = [f"- {_escaped(row.label)}: {_escaped(note)}" for row in table.rows for note in row.notes]
    yield from [*notes, ""] if notes else []


def _escaped(text: str) -> str:
    """Return a text for a line of Markdown: no markup, and nothing that ends a cell."""
    return re.sub(r"[\\`*_\[\]<>|&#~]", r"\\\g<0>", " ".join(visible(text).split()))


set_module("kernels_plugins", globals())
