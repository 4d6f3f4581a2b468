"""Tables: in a pipe, on terminals of any width, on a page; JSON; and text from elsewhere."""

from __future__ import annotations

import html.parser
import io
import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from kernels_core import Table, TableRow, Tabular, as_json, visible

REASON = "it is mapped for cuda, and this call is on cpu: register a kernel for the CPU, or move the model there"
COLUMNS = ("path", "layer", "device", "mode", "origin", "plugin", "calls")
ROWS = tuple(
    TableRow(
        (f"model.layers.{n}.norm", "RMSNorm", "cuda:0", "inference", "kernels-community/norm@0123456789ab", "hub", n),
        "green",
        (REASON,),
    )
    for n in range(5)
)


def terminal(shown: object, width: int) -> list[str]:
    """Return the lines that a terminal of some width gets, without colours and blanks at the end."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip(" ") for line in console.file.getvalue().splitlines()]


def test_pipe() -> None:
    """Columns are aligned, numbers to the right, and notes are below their row, each line of them."""
    rows = (
        TableRow(("norm", 1.5, ["a", "b"]), notes=["slow\nvery slow", "wrong"]),
        TableRow(("mlp", 10, ())),
    )
    lines = str(Table(("name", "ratio", "variants"), rows, "Layers", "2 layers", right=["ratio"])).split("\n")
    assert lines == [
        "Layers",
        "name  ratio  variants",
        "norm    1.5  a b",
        "    slow",
        "    very slow",
        "    wrong",
        "mlp      10",
        "2 layers",
    ]


def test_no_rows_no_columns() -> None:
    """Without rows there are title and summary, on a terminal, too."""
    empty = Table(COLUMNS, title="first", summary="last")
    assert str(empty) == "first\nlast" and terminal(empty, 80) == ["first", "last"]
    assert str(Table(COLUMNS)) == "" and terminal(Table(COLUMNS), 80) == []
    with pytest.raises(ValueError, match="zip"):
        str(Table(("one", "two"), [TableRow(("cell",))]))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 250])
def test_a_terminal_of_any_width(width: int) -> None:
    """No line is longer than the terminal; it is a table from 80 characters on, and nothing of a cell is lost."""
    lines = terminal(Table(COLUMNS, ROWS, summary="the end"), width)
    assert max(map(cell_len, lines)) <= width and lines[-1] == "the end"
    assert ("┃" in "".join(lines)) == (width >= 80)
    shown = "".join("".join(lines).split())
    if width in (20, 40, 60):  # a list
        assert all(f"path:model.layers.{n}.norm" in shown for n in range(5)) and shown.count("origin:") == 5
        assert shown.count("".join(REASON.split())) == 5
    elif width == 250:
        assert all(f"model.layers.{n}.norm" in shown for n in range(5)) and shown.count("0123456789ab") == 5


def test_equal_notes_are_grouped() -> None:
    """On a terminal, a note is below the table, once, with the rows that it is about."""
    lines = terminal(Table(COLUMNS, (*ROWS, TableRow(ROWS[0].cells, notes=["alone"], label="the last"))), 250)
    below = [line for line in lines if "┃" not in line and "│" not in line and line[0] not in "┏┡└"]
    assert below == [
        f"model.layers.0.norm, model.layers.1.norm, model.layers.2.norm and 2 more: {REASON}",
        "the last: alone",
    ]


def test_a_list_leaves_out_empty_cells() -> None:
    """Where there is no room for a table, each row is a paragraph with a line for each cell that says something."""
    rows = [TableRow(("norm", "", ["a", "b"]), notes=["slow", "too often"]), TableRow(("mlp", 0, ()))]
    lines = terminal(Table(("name", "empty", "variants"), rows), 14)
    assert lines == ["name: norm", "variants: a, b", "    slow", "    too often", "", "name: mlp", "empty: 0", ""]


def test_colours() -> None:
    """Rows and titles have their style on a terminal, and on a page."""
    table = Table(("name",), [TableRow(("norm",), "green"), TableRow(("mlp",))], "bad", style="red")
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert "\x1b[31mbad" in out and re.search(r"\x1b\[32m\s*norm", out) and not re.search(r"\x1b\[3\dm\s*mlp", out)
    assert "<tr style='color:var(--kc-green,#0a7436)'><td>norm</td></tr><tr><td>mlp</td></tr>" in table.to_html()


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page, which must be closed, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.lists(st.text(), min_size=2, max_size=2), st.text(), st.text())
def test_pages_show_text_as_text(cells: list[str], note: str, title: str) -> None:
    """Whatever is in cells, notes and titles is no markup, and has no control characters."""
    page = Table(("a", "<b>"), [TableRow(cells, notes=[note])], title).to_html()
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert not tags.open and set(tags.seen) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "br", "wbr"}
    assert tags.seen.count("td") == 3 and tags.text.isprintable()


@given(st.lists(st.text(), min_size=2, max_size=2), st.text(), st.integers(10, 100))
def test_text_from_elsewhere_cannot_drive_a_terminal(cells: list[str], note: str, width: int) -> None:
    """No control character reaches a pipe or a terminal, and a cell cannot forge a row."""
    table = Table(("a", "b"), [TableRow(cells, notes=[note])])
    plain = str(table).split("\n")
    assert all(line.isprintable() for line in plain) and len(plain) == 3 + note.count("\n")
    assert all(line.isprintable() for line in terminal(table, width))


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("plain ünïcode 漢字", None, "plain ünïcode 漢字"),
        ("\x1b[31mred\x07", None, r"\x1b[31mred\x07"),
        ("two\nlines\r\n", None, "two\nlines\\r\n"),
        ("abc\u202edcb\u200b", None, r"abc\u202edcb\u200b"),
        ("\udc80", None, r"\udc80"),
        ("12345", 5, "12345"),
        ("123456", 5, "1234…"),
        ("", 5, ""),
    ],
)
def test_visible(text: str, limit: int | None, shown: str) -> None:
    """Control characters, those that turn text around and half characters are written out; long text is cut."""
    assert visible(text, limit) == shown
    assert visible(shown, limit) == shown


def test_json() -> None:
    """Dataclasses within mappings and sequences are objects; JSON has no NaN and no infinity."""

    @dataclass
    class Point:
        x: float
        inner: tuple[object, ...] = ()

    text = as_json({"points": (Point(1.5, (Point(float("nan")),)), Point(float("-inf")))}, indent=None)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "points": [{"x": 1.5, "inner": [{"x": "nan", "inner": []}]}, {"x": "-inf", "inner": []}]
    }
    assert as_json([1], indent=2) == "[\n  1\n]"


def test_a_result_is_shown_as_its_table() -> None:
    """A result that says which table shows it has each form, also in a notebook."""

    class Result(Tabular):
        def as_table(self) -> Table:
            return Table(("name",), [TableRow(("norm",))])

    shown = Result()
    assert str(shown) == "name\nnorm" and terminal(shown, 80) == terminal(shown.as_table(), 80)
    assert shown._repr_html_() == shown.to_html() == shown.as_table().to_html()


def test_no_word_is_cut() -> None:
    """On a terminal of 80 columns, each word and each part of a name is on one line, in a table and in a list."""
    words = ("ScaledResidualNormalization", "models.FastScaledResidualNormalization", "acme/layers@0123456789abcdef")
    for columns in (words[:1], words[:2], words, words * 2):
        shown = "\n".join(terminal(Table(columns, [TableRow(columns)]), 80))
        for piece in re.split(r"[./@ ]", " ".join(columns)):
            assert re.search(rf"(?<!\w){piece}(?!\w)", shown), shown
