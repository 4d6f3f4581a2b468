"""The page of a choice: how much is won, then each layer by the shapes of its calls."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby

from kernels_core import Page, Section, Table, TableRow

from .cell import REFERENCE, ChoiceCell
from .machine import MeasuredOn

_MODES = {"inference": "Inference", "training": "Training, forward and backward"}
_CONTEXTS = {
    "eager": "launched by the CPU",
    "captured": "replayed from a CUDA graph",
    "compiled": "in compiled code",
}


def choice_page(machines: Sequence[MeasuredOn]) -> Page:
    """Return the page of a choice."""
    cells = [cell for one in machines for cell in one.cells]
    parts = [part for one in machines for part in _machine(one)]
    lead = (
        "Each candidate is verified and timed on calls that a model makes. The fastest serves such calls; the "
        "reference, which is the layer's own forward, serves where none is faster."
    )
    return Page("Measured choice", parts, lead, list(_cards(cells)))


def _cards(cells: Sequence[ChoiceCell]) -> Iterator[TableRow]:
    won = [cell for cell in cells if cell.winner != REFERENCE]
    yield TableRow((f"{len(won)} of {len(cells)}", "kinds of calls are won by a kernel"), "green" if won else "yellow")
    if won:
        gain = statistics.geometric_mean(1 / cell.ratio(cell.winner) for cell in won)
        yield TableRow((f"{gain:.2f}x", "as fast as the reference, there"), "green", ["geometric mean"])
    for fixed in sorted({name for cell in cells for name in cell.times} - {REFERENCE}, key=short_name):
        times = [cell for cell in cells if fixed in cell.times]
        slower = sum(cell.ratio(fixed) > 1 for cell in times)
        yield TableRow((f"{slower} of {len(times)}", f"slower with {short_name(fixed)}"), "yellow" if slower else "")


def _machine(one: MeasuredOn) -> Iterator[object]:
    by_layer = sorted(one.cells, key=lambda cell: (cell.layer, cell.mode, cell.context, cell.dtype, cell.width))
    for layer, of_layer in groupby(by_layer, key=lambda cell: cell.layer):
        parts: list[object] = []
        kinds = groupby(of_layer, key=lambda cell: (cell.mode, cell.context, cell.dtype, cell.width))
        for (mode, context, dtype, width), group in kinds:
            cells = sorted(group, key=lambda cell: cell.bucket)
            title = f"{_MODES[mode]}, {_CONTEXTS[context]}: {dtype}, {width} wide"
            parts.append(Section(title, [_table(cells), *_lost(cells)]))
        yield Section(layer, parts, folded=False)
    yield Section("Measured on", [{**one.machine, **one.libraries}])


def _table(cells: Sequence[ChoiceCell]) -> Table:
    names = [name for name in dict.fromkeys(name for cell in cells for name in cell.times) if name != REFERENCE]
    rows = []
    for cell in cells:
        ratios = [f"{cell.ratio(name):.2f}" if name in cell.times else "" for name in names]
        time = f"{cell.times[REFERENCE] * 1e6:,.1f} us"
        rows.append(TableRow((cell.rows, time, *ratios, short_name(cell.winner)), "green" * (cell.winner != REFERENCE)))
    return Table(
        ("rows", "reference", *map(short_name, names), "serves"), rows, right=["reference", *map(short_name, names)]
    )


def _lost(cells: Sequence[ChoiceCell]) -> Iterator[object]:
    reasons = {name: reason for cell in cells for name, reason in cell.lost.items()}
    if reasons:
        yield Section("Not timed", [f"{short_name(name)}: {reason}" for name, reason in reasons.items()], folded=True)


def short_name(name: str) -> str:
    """Return the name of a candidate for a narrow column: a pack's, a repository's, a class without its packages.

    Example:
        >>> [short_name(n) for n in ("pack:liger:RMSNorm", "LayerRepository('acme/norms', version=1)", "a.b.Norm")]
        ['liger', 'acme/norms', 'Norm']
    """
    if name.startswith("pack:"):
        return name.split(":")[1]
    repository = re.search(r"Repository\('([^']+)'", name)
    return repository[1] if repository else name.rpartition(".")[2]
