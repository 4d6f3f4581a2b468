"""Write `plots/*.svg` from the numbers in the tables of `benchmarks.md`.

Run without arguments to write them, or with `--check` to exit with 1 where one is not current. A table, row or
column that is no longer there is an error: change the plot below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kernels_core import Bars, TableRow

DOCS = Path(__file__).resolve().parent
PAGE = (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def read_table(heading: str) -> dict[str, dict[str, str]]:
    """Return the first table below a heading: cells by the first cell of their row, and by column."""
    _, found, section = PAGE.partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"benchmarks.md has no heading {heading!r}")
    lines = re.search(r"(?:^\|.*\|\n)+", section.partition("\n## ")[0], re.MULTILINE)
    if lines is None:
        raise ValueError(f"there is no table below {heading!r}")
    columns, _, *rows = (line.strip("|").replace("**", "").split("|") for line in lines[0].splitlines())
    names = [column.strip() for column in columns]
    return {row[0].strip(): dict(zip(names, map(str.strip, row), strict=True)) for row in rows}


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell: of `447 / 432 (1.05)`, three."""
    return [float(each) for each in re.findall(r"\d+(?:\.\d+)?", cell)]


def adopted() -> Iterator[TableRow]:
    """An adopted model: the largest ratio of each row."""
    for name, cells in read_table("An adopted model").items():
        ratio = max(numbers(cells["ratio"]))
        yield TableRow((name, ratio), "green" if ratio < 0.98 else "dim")


def warm() -> Iterator[TableRow]:
    """Warm calls: the largest ratio to a plain module, on a CPU and on a GPU."""
    for name, cells in read_table("Warm call, eager").items():
        on_cpu, on_gpu = cells["CPU machine"], cells["one H100, CUDA tensor"]
        if cells["limit"]:
            yield TableRow((name, None))
            yield TableRow(("CPU", max(numbers(on_cpu))), "blue")
            yield TableRow(("CUDA", max(numbers(on_gpu))), "green")


def triton() -> Iterator[TableRow]:
    """Kernels of the pack `triton`: their bandwidth, as a part of that of a copy, for each width."""
    for name, cells in read_table("Kernels of the pack triton").items():
        yield TableRow((name, None))
        for width in ("4096", "5120", "7168", "8192", "12288"):
            yield TableRow((width, numbers(cells[width])[-1]), "green" if "backward" in name else "blue")


PLOTS = {
    "adopted": lambda: Bars(list(adopted()), title="Adopted, of the plain model's time (line: plain)", line=1.0),
    "warm": lambda: Bars(list(warm()), title="A warm call, of a plain module's time (line: 1.30)", line=1.3),
    "triton": lambda: Bars(list(triton()), title="Bandwidth, of that of a copy (line: 0.90)", line=0.9),
}


def main(arguments: list[str]) -> int:
    """Write the plots, or check them; return the exit code."""
    stale = {}
    for name, plot in PLOTS.items():
        path, text = DOCS / "plots" / f"{name}.svg", plot().to_svg()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale[path] = text
    if stale and "--check" in arguments:
        print(f"{', '.join(path.name for path in stale)}: not current: run python docs/generate_plots.py")
        return 1
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
