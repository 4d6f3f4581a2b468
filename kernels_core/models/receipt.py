"""A receipt: what serves each layer of a model, where it comes from, and why nothing else does."""

from __future__ import annotations

import difflib
import html
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentTypeError, RequirementError
from ..resolution import Resolution

if TYPE_CHECKING:
    from rich.table import Table

REFERENCE = "reference"
COLUMNS = ("path", "layer", "device", "mode", "origin", "plugin", "calls")


@dataclass(frozen=True)
class ReceiptRow:
    """One layer of a model.

    Attributes:
        path: Where it is in the model, as in `named_modules`; for a decorated function that a module calls,
            the module's path, a colon, and the function's name.
        layer_name: The name that mappings use.
        layer: Where the layer is defined.
        device: The device of the decision.
        mode: The mode of the decision.
        implementation: The function that is called.
        origin: Where it comes from: repository and commit, class, or `"reference"`.
        plugin: Who offered it.
        refusals: Candidate and reason, for each that was tried and refused.
        misfits: Candidate and reason, for each that is not offered for such a call.
        checked: What was verified about it.
        note: Why no candidate was asked for, where that is so.
        frozen: Whether `kernelize` made the decision.
        calls: What really ran, per origin, while calls were counted; None if they never were.
        aliases: Where else it is, if it is shared.
    """

    path: str
    layer_name: str
    layer: str
    device: str
    mode: str
    implementation: str
    origin: str
    plugin: str = ""
    refusals: tuple[tuple[str, str], ...] = ()
    misfits: tuple[tuple[str, str], ...] = ()
    checked: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    frozen: bool = False
    calls: Mapping[str, int] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def is_reference(self) -> bool:
        """Whether the layer's own forward serves."""
        return self.origin == REFERENCE

    @property
    def remarks(self) -> Iterator[str]:
        """Why it is as it is, a line each."""
        if self.note:
            yield self.note
        yield from (f"refused {candidate}: {reason}" for candidate, reason in self.refusals)
        if self.is_reference:
            yield from (f"not for this call: {candidate}: {reason}" for candidate, reason in self.misfits)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, one item per column."""
        calls = ", ".join(f"{count} {origin}" for origin, count in (self.calls or {}).items())
        if self.calls is not None and set(self.calls) <= {self.origin}:
            calls = str(sum(self.calls.values()))
        kept = " (frozen)" if self.frozen else ""
        path = " = ".join((self.path, *self.aliases))
        return (path, self.layer_name, self.device, self.mode, self.origin + kept, self.plugin, calls)

    @classmethod
    def of(cls, resolution: Resolution, path: str, *aliases: str, **more: Any) -> ReceiptRow:
        """Make the row of a decision."""
        request = resolution.request
        layer = request.layer
        function: Any = resolution.implementation or (layer.reference if layer else None)
        return cls(
            path=path,
            layer_name=request.layer_name,
            layer=layer.qualname if layer else "",
            device=str(request.device),
            mode=request.mode_text,
            implementation=_name(function),
            origin=resolution.origin,
            plugin=resolution.plugin,
            refusals=tuple((_label(refusal), refusal.reason) for refusal in resolution.refusals),
            misfits=tuple((_label(refusal), refusal.reason) for refusal in resolution.misfits),
            checked=dict(resolution.checked),
            note=resolution.note,
            aliases=aliases,
            **more,
        )


def _label(refusal: Any) -> str:
    return refusal.candidate.label if refusal.candidate else f"plugin {refusal.plugin!r}"


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


@dataclass(frozen=True)
class Receipt:
    """What serves each decorated layer of a model.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        rows: A row for each layer, in the order of the model.
    """

    rows: tuple[ReceiptRow, ...]

    def require(self, pattern: str, origin: str | None = None) -> Receipt:
        """Raise unless the layers at some paths are served as wanted.

        Args:
            pattern: A glob over paths, such as `"model.layers.*.mlp"`; `*` goes across dots.
            origin: A glob over origins, such as `"kernels-community/*"`; None for anything but the
                reference.

        Returns:
            The receipt itself, for the next requirement.

        Raises:
            RequirementError: If a layer is served otherwise, with the reason for each, or if no path
                matches.

        Example:
            >>> Receipt(()).require("layers.*")
            Traceback (most recent call last):
            ...
            kernels_core.errors.RequirementError: No decorated layer matches 'layers.*': ...
        """
        for glob in (pattern,) if origin is None else (pattern, origin):
            if not isinstance(glob, str):
                raise ArgumentTypeError(f"require takes globs such as 'layers.*', not {glob!r}.")
        matching = [row for row in self.rows if any(fnmatchcase(path, pattern) for path in (row.path, *row.aliases))]
        if not matching:
            paths = [path for row in self.rows for path in (row.path, *row.aliases)]
            near = difflib.get_close_matches(pattern, paths, 3, 0.3) or paths[:3]
            known = f"there are {len(paths)}, such as {', '.join(map(repr, near))}" if paths else "there is none at all"
            raise RequirementError(f"No decorated layer matches {pattern!r}: {known}.", rows=())
        wanted = "a kernel" if origin is None else f"origin {origin!r}"
        failing = [row for row in matching if not _is_met(row, origin)]
        if failing:
            lines = [line for row in failing for line in (f"  {row.path}: {row.origin}", *_indented(row.remarks))]
            raise RequirementError(
                f"{len(failing)} of {len(matching)} layers that match {pattern!r} are not served by {wanted}:\n"
                + "\n".join(lines),
                rows=failing,
            )
        return self

    def diff(self, other: Receipt) -> ReceiptDiff:
        """Return what is otherwise in another receipt.

        Example:
            >>> bool(Receipt(()).diff(Receipt(())))
            False
        """
        if not isinstance(other, Receipt):
            raise ArgumentTypeError(f"diff takes another receipt, not {other!r}.")
        mine, theirs = ({row.path: row for row in receipt.rows} for receipt in (self, other))
        changed = [
            (row, theirs[path])
            for path, row in mine.items()
            if path in theirs and _served(row) != _served(theirs[path])
        ]
        return ReceiptDiff(
            changed=tuple(changed),
            added=tuple(row for path, row in theirs.items() if path not in mine),
            removed=tuple(row for path, row in mine.items() if path not in theirs),
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON: a list of rows.

        Example:
            >>> Receipt(()).to_json()
            '[]'
        """
        return json.dumps([_plain(row) for row in self.rows], indent=indent)

    def to_html(self) -> str:
        """Return a table for a page or a notebook, complete in itself.

        Example:
            >>> Receipt(()).to_html().startswith("<table")
            True
        """
        head = "".join(f"<th style='text-align:left'>{column}</th>" for column in COLUMNS)
        body = "".join(
            f"<tr style='color:{'#a15c00' if row.is_reference else '#0a7d33'}'>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells)
            + "</tr>"
            + "".join(f"<tr><td></td><td colspan='6'>{html.escape(line)}</td></tr>" for line in row.remarks)
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    _repr_html_ = to_html

    def __str__(self) -> str:
        """A plain table, with reasons below the rows that they concern."""
        if not self.rows:
            return "no decorated layer"
        used = [
            i for i, column in enumerate(COLUMNS) if column != "calls" or any(r.calls is not None for r in self.rows)
        ]
        table = [tuple(COLUMNS[i] for i in used), *(tuple(row.cells[i] for i in used) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
        ]
        text = [lines[0]]
        for line, row in zip(lines[1:], self.rows, strict=True):
            text += [line, *_indented(row.remarks)]
        return "\n".join(text)

    def __rich__(self) -> Table:
        """A table with colours: green where a kernel serves, yellow where the reference does."""
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row.cells), style="yellow" if row.is_reference else "green")
            for line in row.remarks:
                table.add_row("", "", "", "", Text(line), "", "", style="dim")
        return table


@dataclass(frozen=True)
class ReceiptDiff:
    """What is otherwise in a second receipt.

    Attributes:
        changed: Rows of one path that are served otherwise, before and after.
        added: Rows of paths that are new.
        removed: Rows of paths that are gone.
    """

    changed: tuple[tuple[ReceiptRow, ReceiptRow], ...]
    added: tuple[ReceiptRow, ...]
    removed: tuple[ReceiptRow, ...]

    def __bool__(self) -> bool:
        """Whether anything is otherwise."""
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        """A line for each difference."""
        lines = []
        for before, after in self.changed:
            lines += [f"~ {before.path}: {_served(before)} -> {_served(after)}", *_indented(after.remarks)]
        lines += [f"+ {row.path}: {_served(row)}" for row in self.added]
        lines += [f"- {row.path}: {_served(row)}" for row in self.removed]
        return "\n".join(lines) or "no difference"


def _served(row: ReceiptRow) -> str:
    return f"{row.origin} on {row.device} for {row.mode}"


def _is_met(row: ReceiptRow, origin: str | None) -> bool:
    return not row.is_reference if origin is None else fnmatchcase(row.origin, origin)


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return ("    " + line.replace("\n", "\n    ") for line in lines)


def _plain(row: ReceiptRow) -> dict[str, Any]:
    plain = dict(vars(row))
    plain["refusals"] = [{"candidate": candidate, "reason": reason} for candidate, reason in row.refusals]
    plain["misfits"] = [{"candidate": candidate, "reason": reason} for candidate, reason in row.misfits]
    plain["checked"] = dict(row.checked)
    plain["calls"] = dict(row.calls) if row.calls is not None else None
    return plain
