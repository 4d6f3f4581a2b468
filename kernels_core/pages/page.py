"""`Page`: a page that people show around: one file, without scripts and without anything from elsewhere."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..table import LONGEST, TableRow, escaped, visible
from .style import STYLE

_HEAD = (
    "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width,initial-scale=1'>"
    # The browser itself refuses scripts and requests, in case text from elsewhere should ever become markup.
    "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:\"><meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
)


@dataclass(frozen=True)
class Section:
    """A part of a page with a title.

    Attributes:
        title: Its title.
        parts: What it shows, as in `Page`.
        note: Text beside the title.
        style: The colour of its title and edge, as of a `TableRow`.
        folded: Whether readers open it (True), or close it (False) by a click; None for one that stays open.

    Example:
        >>> Section("Norms", ["measured on this machine"]).title
        'Norms'
    """

    title: str
    parts: Sequence[object] = ()
    note: str = ""
    style: str = ""
    folded: bool | None = None


@dataclass(frozen=True)
class Page:
    """A page for a browser: readable in light and dark, on a phone and on paper.

    Its parts, and those of sections, are: texts, which are paragraphs with their line ends, where indented lines such
    as `layer: (x)` and `kernel: (x, y)` stand side by side; lists of texts; mappings, as names with values; sections;
    and objects with `to_html`, such as `Table` and `Bars`. All text is shown as text.

    Attributes:
        title: The title.
        parts: What it shows, in order.
        lead: Text below the title.
        cards: The summary: a number or a word, and a text about it, for each; with style and notes.

    Example:
        >>> page = Page("Choice", ["All won."], cards=[TableRow(("3 of 4", "layers are faster"), "green")])
        >>> page.to_html().startswith("<!doctype html>")
        True
    """

    title: str
    parts: Sequence[object] = ()
    lead: str = ""
    cards: Sequence[TableRow] = field(default_factory=tuple)

    def to_html(self) -> str:
        """Return the page as one file."""
        title = f"<title>{html.escape(visible(self.title))}</title>"
        body = f"<body class='kc'><main class='kc-main'>{self._inner()}</main></body>"
        return f"{_HEAD}{title}<style>{STYLE}</style></head>{body}</html>\n"

    def _repr_html_(self) -> str:
        """Return the page for a notebook."""
        return f"<div class='kc'><style>{STYLE}</style><div class='kc-main'>{self._inner()}</div></div>"

    def _inner(self) -> str:
        lead = "".join(_paragraphs(self.lead)) if self.lead else ""
        cards = "".join(map(_card, self.cards))
        cards = cards and f"<div class='kc-cards'>{cards}</div>"
        return f"<h1>{escaped(self.title)}</h1>{lead}{cards}{_parts(self.parts)}"


def _card(row: TableRow) -> str:
    value, text = row.texts(", ")
    notes = "".join(f"<br><small>{escaped(note)}</small>" for note in row.notes)
    return f"<div{_style(row.style)}><b>{html.escape(value)}</b>{html.escape(text)}{notes}</div>"


def _style(style: str) -> str:
    return f" class='kc-{html.escape(style)}'" if style else ""


def _parts(parts: Sequence[object], level: int = 2) -> str:
    return "".join(text for part in parts for text in _part(part, level))


def _part(part: Any, level: int) -> Iterator[str]:
    if isinstance(part, str):
        yield from _paragraphs(part)
    elif isinstance(part, Mapping):
        names = (
            f"<div><dt>{escaped(str(name))}</dt><dd>{escaped(str(each))}</dd></div>" for name, each in part.items()
        )
        yield f"<dl>{''.join(names)}</dl>"
    elif isinstance(part, Section):
        title, inner = escaped(part.title), _parts(part.parts, 3)
        note = part.note and f" <span class='kc-note'>{escaped(part.note)}</span>"
        if part.folded is None:
            yield f"<section{_style(part.style)}><h{level}>{title}{note}</h{level}>{inner}</section>"
        else:
            opened = "" if part.folded else " open"
            summary = f"<summary><b>{title}</b>{note}</summary>"
            yield f"<details{_style(part.style)}{opened}>{summary}<div>{inner}</div></details>"
    elif hasattr(part, "to_html"):
        yield (
            f"<div class='kc-scroll' role='region' aria-label='table' tabindex='0'>{part.to_html()}</div>"
            if hasattr(part, "columns")
            else part.to_html()
        )
    else:
        yield f"<ul>{''.join(f'<li>{escaped(str(each))}</li>' for each in part)}</ul>"


_PAIR = re.compile(r"\s+(\w[\w ]{,19}):\s+(\S.*)")
"""An indented line of a reason that compares: `    layer:  (x)`."""


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a text with its line ends; indented lines with names stand side by side."""
    for paired, group in itertools.groupby(
        visible(text, LONGEST).split("\n"), lambda line: _PAIR.fullmatch(line) is not None
    ):
        lines = list(group)
        if paired and len(lines) > 1:
            pairs = (line.strip().split(":", 1) for line in lines)
            boxes = (
                f"<div><dt>{escaped(name)}</dt><dd><code>{escaped(of.strip())}</code></dd></div>" for name, of in pairs
            )
            yield f"<dl class='kc-pairs'>{''.join(boxes)}</dl>"
        else:
            yield f"<p>{'<br>'.join(escaped(line.strip()) for line in lines)}</p>"
