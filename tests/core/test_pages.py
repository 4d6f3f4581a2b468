"""Pages: text stays text, nothing comes from elsewhere, and a browser shows them on a phone, in the dark, on paper."""

from __future__ import annotations

import html.parser
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from hypothesis import given
from hypothesis import strategies as st

from kernels_core import Bars, Page, Receipt, ReceiptRow, Section, Table, TableRow
from kernels_core.pages.style import DARK, LIGHT

VOID = {"br", "link", "meta", "wbr"}
REASON = "its forward takes other parameters\n    layer:  (x)\n    kernel: (x, *, alpha=1.0)\n  they must be equal"
ROWS = [
    TableRow(("Prefill", None)),
    TableRow(("plain", 32.1), "dim"),
    TableRow(("adopted", 27.1, "0.84"), "green", ["of <torch>"]),
    TableRow(("crashed", float("nan")), "red"),
]


class Shell(html.parser.HTMLParser):
    """Reads a page: each tag is closed, and nothing leads elsewhere or runs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "img", "iframe", "object", "form", "a")
        assert not [name for name, value in attrs if name.startswith("on") or "://" in (value or "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data
        else:
            assert not re.search(r"url\(|@import|//", data)


def example(text: str) -> Page:
    """Return a page that has each part, with a text in each place of it."""
    table = Table((text, "ms"), [TableRow((text, 1.5), "green", [text])], title=text, right=["ms"])
    parts = [text, [text], {text: text}, table, Bars([TableRow((text, 1.0), "green", [text])], title=text)]
    inner = Section(text, parts, note=text)
    return Page(text, [*parts, inner, Section(text, [inner], text, "red", folded=True)], text, [TableRow((text, text))])


@given(st.text())
def test_text_is_no_markup(text: str) -> None:
    """Whatever stands in a place of a page or a picture is text there, without control characters."""
    marked = f"{text}<script>&'\"<b>"
    page = Shell(example(marked).to_html())
    assert page.text.replace("\n", "").isprintable() and page.tags.count("b") == Shell(
        example("x").to_html()
    ).tags.count("b")
    Shell(example(marked)._repr_html_())
    assert ElementTree.fromstring(Bars([TableRow((marked, 1.0))], marked, marked).to_svg()).tag.endswith("svg")


def test_reasons() -> None:
    """Lines of a reason stay lines, and those that compare stand side by side."""
    page = Page("x", [f"refused\n  why\n{REASON}"]).to_html()
    assert "<p>refused<br>why<br>its forward takes other parameters</p><dl class='kc-pairs'>" in page
    assert "<dt>kernel</dt><dd><code>(x, *, alpha=1.0)</code></dd></div></dl><p>they must be equal</p>" in page


def test_bars() -> None:
    """A bar is as long as its number; a number that is not finite has none; a line is where its number is."""
    bars = Bars(ROWS, "ms", line=16.05)
    page = bars.to_html()
    assert re.findall(r"width:([\d.]+)%", page) == ["100", "84.42", "0"] and page.count("left:50%") == 3
    assert re.findall(r"value'>([^<]*)", page) == ["32.1 ms", "0.84", "nan ms"] and "<h3>Prefill</h3>" in page
    picture = ElementTree.fromstring(bars.to_svg())
    bright = [each.get("class") for each in picture.iter() if each.tag.endswith("rect")]
    assert bright == ["back", "dim", "green", "red"] and Bars(()).to_svg() and Bars([TableRow(("a", 0))]).to_html()


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(colours: dict[str, str]) -> None:
    """Each text colour has the contrast of WCAG AA, 4.5, to both backgrounds."""

    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for back in (colours["back"], colours["panel"]):
        for name in ("text", "dim", "green", "yellow", "red", "blue"):
            low, high = sorted((luminance(back), luminance(colours[name])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, back)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_browser_shows_pages(tmp_path: Path) -> None:
    """Pages load without errors and requests; on 400 pixels nothing is cut; folded parts open by key, and on paper."""
    page = Page(
        "Receipt of <model>",
        [Bars(ROWS, "ms"), Section("norm" * 30, [REASON, ["a.path.to.a.layer" * 9]], "24 layers", folded=True)],
        cards=[TableRow(("9 of 9", "layers"), "green")] * 4,
    )
    row = ReceiptRow("a." * 60, "<N>", "x.N", "cpu", "training", "x.N.forward", "reference", refusals=(("k", REASON),))
    file, second = tmp_path / "page.html", tmp_path / "receipt.html"
    file.write_text(page.to_html(), encoding="utf-8")
    second.write_text(Receipt((row, row), {"model": "<M>"}).to_html(), encoding="utf-8")
    backs = set()
    with browser(tmp_path) as tab:
        for shown, width in ((second, 1280), (second, 400), (file, 1280), (file, 400)):
            for scheme in ("light", "dark"):
                assert not tab.faults(shown.as_uri(), width, scheme=scheme)
                backs.add(tab.value("getComputedStyle(document.body).backgroundColor"))
        assert len(backs) == 2
        assert tab.value("document.querySelector('summary').focus(); document.activeElement.tagName") == "SUMMARY"
        for kind in ("keyDown", "keyUp"):
            tab.send(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
            )
        assert tab.value("document.querySelector('details').open") is True
        tab.value("document.querySelector('details').open = false")
        visible = "document.querySelector('.kc-pairs').checkVisibility({contentVisibilityProperty: true})"
        assert tab.value(visible) is False
        tab.send("Emulation.setEmulatedMedia", media="print")
        assert tab.value(visible) is True
