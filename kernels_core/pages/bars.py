"""`Bars`: numbers as horizontal bars, on a page and as a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ..table import TableRow, escaped, visible
from .style import DARK, LIGHT

_WIDTH, _LABEL, _VALUE, _ROW, _LETTER = 760, 300, 96, 26, 7.2
"""Pixels of a picture: all of it, its labels, its numbers, the height of a row, a letter."""


@dataclass(frozen=True)
class Bars:
    """Numbers as horizontal bars.

    Attributes:
        rows: A row for each bar. Its cells are the label, the number (at least 0; None for a heading), and, if it is
            to differ from the number with its unit, the text beside the bar. Its style is the colour: `"green"`,
            `"yellow"`, `"red"`, `"blue"`, `"dim"`. Its notes are shown below the label, not in pictures.
        unit: The unit of the numbers.
        title: Text above the bars.
        line: A number to draw a line at, such as that of a limit.

    Example:
        >>> bars = Bars([TableRow(("plain", 32.1)), TableRow(("adopted", 27.1), "green")], unit="ms", title="Prefill")
        >>> bars.to_svg()[:40]
        '<svg xmlns="http://www.w3.org/2000/svg" '
    """

    rows: Sequence[TableRow]
    unit: str = ""
    title: str = ""
    line: float | None = None

    def to_html(self) -> str:
        """Return the bars for a `Page`, whose style they need."""
        return f"<div class='kc-bars'>{self.title and f'<p>{escaped(self.title)}</p>'}{''.join(self._html())}</div>"

    def _html(self) -> Iterator[str]:
        line = "" if self.line is None else f"<s style='left:{100 * self._share(self.line):.4g}%'></s>"
        for row in self.rows:
            label, text, share = self._read(row)
            if text is None:
                yield f"<h3>{escaped(label)}</h3>"
                continue
            notes = "".join(f"<small>{escaped(note)}</small>" for note in row.notes)
            yield (
                f"<div class='kc-{html.escape(row.style)}'><span class='kc-label'>{escaped(label)}{notes}</span>"
                f"<span class='kc-bar'><i style='width:{100 * share:.4g}%'></i>{line}</span>"
                f"<span class='kc-value'>{escaped(text)}</span></div>"
            )

    def to_svg(self) -> str:
        """Return the bars as an SVG picture, complete in itself, for light and dark pages."""
        top = _ROW * bool(self.title) + 10
        height = top + _ROW * len(self.rows) + 10
        room = _WIDTH - _LABEL - _VALUE - 30
        body = [_text(14, 24, self.title, "b")] if self.title else []
        for number, row in enumerate(self.rows):
            label, text, share = self._read(row)
            y = top + _ROW * number
            if text is None:
                body.append(_text(14, y + 18, label, "b"))
                continue
            fits = label if len(label) * _LETTER <= _LABEL else label[: int(_LABEL / _LETTER) - 1] + "…"
            body.append(_text(14, y + 18, fits))
            width, style = max(room * share, 1), html.escape(row.style or "blue")
            body.append(f'<rect class="{style}" x="{_LABEL + 20}" y="{y + 5}" width="{width:.1f}" height="16" rx="2"/>')
            body.append(_text(_WIDTH - 14, y + 18, text, "value"))
        if self.line is not None:
            x = _LABEL + 20 + room * self._share(self.line)
            body.append(f'<path class="line" d="M{x:.1f} {top}V{height - 10}"/>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" role="img">\n<title>{_one_line(self.title or "bars")}</title>\n'
            f"<style>{_svg_style()}</style>\n"
            f'<rect class="back" width="{_WIDTH}" height="{height}" rx="8"/>\n' + "\n".join(body) + "\n</svg>\n"
        )

    def _read(self, row: TableRow) -> tuple[str, str | None, float]:
        """Return label, text and share of a row; no text for a heading."""
        label, number, *more = row.cells
        if number is None:
            return str(label), None, 0
        text = str(more[0]) if more else " ".join(filter(None, (f"{number:.3g}", self.unit)))
        return str(label), text, self._share(number)

    def _share(self, number: object) -> float:
        """Return the part of the longest bar that a number takes; 0 for one that is not finite."""
        largest = max((n for n in (self.line, *(row.cells[1] for row in self.rows)) if _is_finite(n)), default=0)
        return number / largest if _is_finite(number) and largest > 0 else 0


def _is_finite(number: object) -> TypeGuard[float]:
    return isinstance(number, int | float) and math.isfinite(number) and number >= 0


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text{style and f" class={style!r}"} x="{x:.1f}" y="{y}">{_one_line(text)}</text>'


def _one_line(text: str) -> str:
    return html.escape(visible(text).replace("\n", " "))


def _svg_style() -> str:
    def colours(of: dict[str, str]) -> str:
        fills = "".join(f".{name}{{fill:{of[name]}}}" for name in ("green", "yellow", "red", "blue", "dim"))
        return f"text{{fill:{of['text']}}}.back{{fill:{of['panel']}}}.line{{stroke:{of['text']}}}{fills}"

    fixed = "text{font:13px system-ui,sans-serif}.b{font-weight:600}.value{text-anchor:end}"
    return f"{fixed}{colours(LIGHT)}@media(prefers-color-scheme:dark){{{colours(DARK)}}}"
