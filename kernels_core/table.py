"""Tables: aligned columns in a pipe, colours on a terminal, HTML on a page; and JSON for programs."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ArgumentTypeError, require_type
from .text import cleaned

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

Item = TypeVar("Item")

LONGEST = 2_000
"""Characters of a cell or a note that are shown."""

_COLOURS = {"green": "#0a7436", "yellow": "#8a5000", "red": "#b00020", "dim": "#666666"}


def visible(text: str, limit: int | None = None) -> str:
    r"""Return a text with its control characters written out, so that it cannot drive a terminal, and without secrets.

    For text from elsewhere: names and metadata of repositories, messages of other libraries. Line ends stay. Users and
    passwords in URLs are left out, and tokens in headers. Errors and warnings of ours do this to their messages.

    Args:
        text: The text.
        limit: The number of characters to cut it to; None for all of it.

    Example:
        >>> print(visible("v1\x1b[2J\rv2"))
        v1\x1b[2J\rv2
        >>> visible("a long story", 7)
        'a long…'
        >>> visible("http://me:password@hub.local is not reachable")
        'http://***@hub.local is not reachable'
    """
    require_type(text, str, "text")
    require_type(limit, (int, NoneType), "limit")
    return cleaned(text, limit)


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as JSON: dataclasses as objects, numbers that are not finite as text.

    Args:
        value: Dataclasses, mappings, sequences, texts and numbers, within each other.
        indent: As in `json.dumps`.

    Example:
        >>> as_json({"largest error": float("inf")}, indent=None)
        '{"largest error": "inf"}'
    """
    try:
        return json.dumps(_plain(value), indent=indent)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ArgumentTypeError(f"This cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):  # not by `asdict`: it would copy every leaf
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        cells: A text or a list of texts for each column; anything else is shown as `str` shows it.
        style: Its style on a terminal, such as `"red"`.
        notes: Remarks about it, each of one or more lines.
        label: Its name where notes are listed apart from the row; by default the first cell.
    """

    cells: Sequence[object]
    style: str = ""
    notes: Sequence[str] = ()
    label: str = ""

    def texts(self, between: str) -> list[str]:
        """Return a text for each cell, with `between` between the items of a list."""
        return [
            between.join(map(_one_line, cell)) if isinstance(cell, list | tuple) else _one_line(cell)
            for cell in self.cells
        ]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, for each place where people read.

    `str` gives aligned columns, each row on one line however long, for `grep` and `cut`. `rich.print` draws a table
    that fits the terminal, or a list where the terminal is too narrow for one.

    Attributes:
        columns: The names of the columns.
        rows: The rows; without any, the columns are not shown either.
        title: Text above the table.
        summary: Text below it.
        style: The style of the title on a terminal.
        right: The names of columns that are aligned to the right.

    Example:
        >>> print(Table(("name", "calls"), [TableRow(("norm", 12)), TableRow(("mlp", 1))], right=["calls"]))
        name  calls
        norm     12
        mlp       1
    """

    columns: Sequence[str]
    rows: Sequence[TableRow] = ()
    title: str = ""
    summary: str = ""
    style: str = ""
    right: Collection[str] = ()

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], style: Callable[[dict[str, Any]], str] | None = None) -> Table:
        """Make a table of records that have the same keys, which become the columns.

        Args:
            records: The rows.
            style: Gives the style of a row on a terminal, such as `red`.

        Example:
            >>> print(Table.of([{"name": "silu", "variants": ["torch-cpu", "torch-cuda"]}]))
            name  variants
            silu  torch-cpu torch-cuda
        """
        rows = (TableRow(tuple(record.values()), style(record) if style else "") for record in records)
        return cls(tuple(records[0]) if records else (), tuple(rows))

    def __str__(self) -> str:
        """Aligned columns, with the notes of a row below it."""
        lines = [visible(self.title)] if self.title else []
        if self.rows:
            table = [(list(self.columns), ()), *((row.texts(" "), row.notes) for row in self.rows)]
            widths = [max(map(len, column)) for column in zip(*(cells for cells, _ in table), strict=True)]
            sides = [str.rjust if column in self.right else str.ljust for column in self.columns]
            for cells, notes in table:
                aligned = (side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True))
                lines += ["  ".join(aligned).rstrip(), *indented(notes)]
        return "\n".join([*lines, visible(self.summary)] if self.summary else lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A table with colours and the notes below it; a list where a word would be cut."""
        from rich.padding import Padding
        from rich.text import Text

        if self.title:
            yield Text(visible(self.title), style=self.style)
        widths = self._widths(options.max_width) if self.rows else None
        if widths is not None:
            yield from self._drawn(widths)
        else:
            for row in self.rows:
                named = zip(self.columns, row.texts(", "), strict=True)
                yield Text("\n".join(f"{column}: {cell}" for column, cell in named if cell), style=row.style)
                notes = Text("\n".join(visible(note, LONGEST) for note in row.notes), style="dim")
                yield Padding(notes, (0, 0, 1, 4)) if row.notes else Text()
        if self.summary:
            yield Text(visible(self.summary))

    def _drawn(self, widths: list[int]) -> Iterator[RenderableType]:
        """Yield the table, and below it each note with the rows that have it."""
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(header_style="bold")
        for column in self.columns:
            drawn.add_column(column, justify="right" if column in self.right else "left", no_wrap=True)
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            cells = row.texts("\n")
            wrapped = (_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True))
            drawn.add_row(*map(Text, wrapped), style=row.style or None)
            for note in row.notes:
                notes.setdefault(note, []).append(row.label or cells[0])
        yield drawn
        for note, labels in notes.items():
            named = dict.fromkeys(labels)
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            yield Text(f"{', '.join(list(named)[:3])}{more}: {visible(note, LONGEST)}", style="dim")

    def _widths(self, width: int) -> list[int] | None:
        """Return the width of each column on lines of a width; None if a word would be cut."""
        table = [self.columns, *(row.texts("\n") for row in self.rows)]
        lines = [[line for cell in column for line in cell.split("\n")] for column in zip(*table, strict=True)]
        found = [max(map(len, column)) for column in lines]
        least = [
            most
            if name in self.right
            else max(len(piece.rstrip()) for line in column for piece in _PIECE.findall(line))
            for name, most, column in zip(self.columns, found, lines, strict=True)
        ]
        over = sum(found) + 3 * len(found) + 1 - width  # lines and blanks between the columns
        while over > 0:
            most, column = max(
                ((most if most > few else 0), at) for at, (most, few) in enumerate(zip(found, least, strict=True))
            )
            if not most:
                return None
            found[column] -= 1
            over -= 1
        return found

    def to_html(self) -> str:
        """Return the table for a page or a notebook, complete in itself.

        Example:
            >>> Table(("name",), [TableRow(("<norm>",))]).to_html()[-46:]
            '<tr><td>&lt;norm&gt;</td></tr></tbody></table>'
        """
        caption = escaped("\n".join(filter(None, (self.title, self.summary))))
        sides = [" style='text-align:right'" if column in self.right else "" for column in self.columns]
        left = " style='text-align:left'"
        head = "".join(
            f"<th{side or left}>{escaped(column)}</th>" for side, column in zip(sides, self.columns, strict=True)
        )
        body = ""
        for row in self.rows:  # a page defines the variable, for light and for dark
            known = _COLOURS.get(row.style)
            colour = f" style='color:var(--kc-{row.style},{known})'" if known else ""
            cells = zip(sides, row.texts(", "), strict=True)
            body += f"<tr{colour}>{''.join(f'<td{side}>{html.escape(cell)}</td>' for side, cell in cells)}</tr>"
            for note in row.notes:
                text = escaped(visible(note, LONGEST))
                body += f"<tr><td colspan='{len(self.columns)}' style='padding-left:2em'>{text}</td></tr>"
        caption = caption and f"<caption style='text-align:left'>{caption}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Tabular(ABC):
    """A result that is shown as a table: as text, on a terminal, in a notebook, on a page."""

    @abstractmethod
    def as_table(self) -> Table:
        """Return the table that shows it."""

    def __str__(self) -> str:
        """Its table as plain text."""
        return str(self.as_table())

    def __rich__(self) -> Table:
        """Its table with colours, for `rich.print`."""
        return self.as_table()

    def to_html(self) -> str:
        """Return its table for a page or a notebook, complete in itself."""
        return self.as_table().to_html()

    def _repr_html_(self) -> str:
        return self.to_html()


def indented(notes: Iterable[str]) -> Iterator[str]:
    """Yield notes as they stand below a row, also those of several lines."""
    return ("    " + visible(note, LONGEST).replace("\n", "\n    ") for note in notes)


def folded(items: Iterable[tuple[str, object, Item]]) -> list[tuple[str, Item]]:
    """Return paths in a model, each with its item, with one for those whose keys are equal: `layers.0-23.mlp`.

    The last number of their paths is folded first, so that `layers.0-23.experts.0-7` is one, too.

    Args:
        items: Triples of a path, a key and an item.
    """
    keyed = [(key, re.split(r"(?<![^.])(\d+)(?![^.:])", path), item) for path, key, item in items]
    for back in range(1, max((len(parts) for _, parts, _ in keyed), default=0), 2):
        groups: dict[object, list[tuple[object, list[str], Item]]] = {}
        for each in keyed:
            key, parts, _ = each
            number = len(parts) - 1 - back
            alike = (key, *parts[:number], *parts[number + 1 :]) if number > 0 else id(each)
            groups.setdefault(alike, []).append(each)
        keyed = []
        for group in groups.values():
            key, parts, item = group[0]
            number = len(parts) - 1 - back
            if len(group) > 1:
                parts = [*parts[:number], ranges(p[number] for _, p, _ in group), *parts[number + 1 :]]
            keyed.append((key, parts, item))
    return [("".join(parts), item) for _, parts, item in keyed]


def ranges(numbers: Iterable[str]) -> str:
    """Write numbers shortly: `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


_PIECE = re.compile(r"[^\s/@.:]*(?:[\s/@.:]+|$)")
"""A word, or a part of a path or dotted name: a line may end after it."""


def _wrapped(cell: str, width: int) -> str:
    """Break a cell into lines, after words and after parts of names."""
    lines = []
    for line in cell.split("\n"):
        current = ""
        for piece in _PIECE.findall(line):
            if current and len(current) + len(piece.rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            current += piece
        lines.append(current.rstrip())
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a text as HTML: no markup, no control characters, and with ends of lines; long names may be broken."""
    return re.sub(r"(?<=\w)[./:@](?=[^\W\d])", r"\g<0><wbr>", html.escape(visible(text)).replace("\n", "<br>"))


def _one_line(cell: object) -> str:
    return visible(str(cell), LONGEST).replace("\n", "\\n")
