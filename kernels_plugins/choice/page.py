"""The page of a choice: how much is won, then each layer by the shapes of its calls; and its table, which is short."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import fill, wrap

from kernels_core import Page, Section, Table, TableRow

from .cell import ALIAS, REFERENCE, ChoiceCell
from .machine import MeasuredOn

_MODES = {"inference": "Inference", "training": "Training, forward and backward"}
_CONTEXTS = {
    "eager": "launched by the CPU",
    "captured": "replayed from a CUDA graph",
    "compiled": "in compiled code",
}

_WIDTH = 80
"""Characters of a line of the table, if names are not long."""
_CALLS = 32
"""Of these, the most for rows, dtype and width: winners that take turns have many ranges of rows."""


def choice_page(machines: Sequence[MeasuredOn]) -> Page:
    """Return the page of a choice."""
    cells = [cell for one in machines for cell in one.cells]
    parts = [part for one in machines for part in _machine(one)]
    lead = (
        "Each candidate is verified and timed on calls that a model makes. The fastest serves such calls; the "
        "reference, which is the layer's own forward, serves where none is faster."
    )
    return Page("Measured choice", parts, lead, list(_cards(cells)))


def choice_table(machines: Sequence[MeasuredOn], summary: str) -> Table:
    """Return a row for all calls of a kind that the same candidate serves, and why others were not timed, each once."""
    cells = [(one.machine.get("model", ""), cell) for one in machines for cell in one.cells]
    dtypes = {cell.dtype for _, cell in cells}
    widths: dict[str, set[int]] = {}
    groups: dict[tuple[str, ...], list[ChoiceCell]] = {}
    untimed: dict[str, dict[str, None]] = {}
    for model, cell in cells:
        widths.setdefault(cell.layer, set()).add(cell.width)
        place = (cell.layer, cell.winner, cell.mode, cell.context, cell.dtype, str(cell.width), model)
        groups.setdefault(place, []).append(cell)
        for name, reason in _untimed(cell):
            untimed.setdefault(reason, {})[f"{short_name(name)} of {cell.layer}"] = None
    rows = []
    for (layer, winner, mode, context, dtype, width, model), group in groups.items():
        names = dict.fromkeys(name for cell in group for name in cell.order if name not in (winner, REFERENCE))
        others = ", ".join(f"{short_name(name)} {_ratios(group, name)}" for name in names)
        kind = (dtype if len(dtypes) > 1 else "", f"{width} wide" if len(widths[layer]) > 1 else "")
        buckets, notes = _buckets(group), [others]
        if len(", ".join(filter(None, (buckets, *kind)))) > _CALLS:
            notes.insert(0, f"rows {buckets}")
            buckets = f"{len(buckets.split())} ranges"
        calls = ", ".join(filter(None, (buckets, *kind)))
        values: tuple[str, ...] = (layer, short_name(winner), mode, context, calls, _ratios(group, winner))
        values = (*values, model) if len(machines) > 1 else values
        style, label = "green" if winner != REFERENCE else "", f"{layer}, {mode}, {context}"
        rows.append(TableRow(values, style, [line for note in notes for line in wrap(note, _WIDTH - 4)], label))
    rows.sort(key=lambda row: (row.cells[0], row.cells[2:4]))
    reasons = [f"not timed: {', '.join(names)}: {reason}" for reason, names in untimed.items()]
    text = "\n".join(fill(line, _WIDTH, subsequent_indent="    ") for line in (*reasons, summary))
    columns = ("layer", "serves", "mode", "context", "rows", "of ref.", "machine")
    return Table(columns if len(machines) > 1 else columns[:-1], rows, summary=text)


def _buckets(cells: Sequence[ChoiceCell]) -> str:
    """Return the rows of cells, those that follow each other as one range.

    Example:
        >>> place = ("N", "cpu", "eager", "inference", "float32", 64)
        >>> _buckets([ChoiceCell(*place, bucket, {"reference": 1e-6}) for bucket in (1, 2, 3, 8)])
        '1-7 128-255'
    """
    runs: list[list[ChoiceCell]] = []
    for cell in sorted(cells, key=lambda cell: cell.bucket):
        if runs and cell.bucket == runs[-1][-1].bucket + 1:
            runs[-1].append(cell)
        else:
            runs.append([cell])
    ends = ((run[0].rows.split("-")[0], run[-1].rows.split("-")[-1]) for run in runs)
    return " ".join("-".join(dict.fromkeys(pair)) for pair in ends)


def _ratios(cells: Sequence[ChoiceCell], name: str) -> str:
    """Return the time of a candidate as a multiple of that of the reference, from the least to the most of all cells.

    Example:
        >>> place = ("N", "cpu", "eager", "inference", "float32", 64)
        >>> cells = [ChoiceCell(*place, 1, {"reference": 2e-6, "fast": time}) for time in (1e-6, 1.5e-6)]
        >>> _ratios(cells, "fast"), _ratios(cells, "reference")
        ('0.50-0.75', '1.00')
    """
    found = sorted(cell.ratio(name) for cell in cells if name in cell.times)
    return "-".join(dict.fromkeys((f"{found[0]:.2f}", f"{found[-1]:.2f}")))


def _cards(cells: Sequence[ChoiceCell]) -> Iterator[TableRow]:
    won = [cell for cell in cells if cell.winner != REFERENCE]
    yield TableRow((f"{len(won)} of {len(cells)}", "kinds of calls are won by a kernel"), "green" if won else "yellow")
    if won:
        gain = statistics.geometric_mean(1 / cell.ratio(cell.winner) for cell in won)
        yield TableRow((f"{gain:.2f}x", "as fast as the reference, there"), "green", ["geometric mean"])
    fixed: dict[str, list[float]] = {}  # a pack has a name for each layer, and one card
    for cell in cells:
        for name in cell.times.keys() - {REFERENCE}:
            fixed.setdefault(short_name(name), []).append(cell.ratio(name))
    for name, ratios in sorted(fixed.items()):
        slower = sum(ratio > 1 for ratio in ratios)
        yield TableRow((f"{slower} of {len(ratios)}", f"slower with {name}"), "yellow" if slower else "")


def _machine(one: MeasuredOn) -> Iterator[object]:
    by_layer = sorted(one.cells, key=lambda cell: (cell.layer, cell.mode, cell.context, cell.dtype, cell.width))
    for layer, group in groupby(by_layer, key=lambda cell: cell.layer):
        of_layer = list(group)
        parts: list[object] = []
        kinds = groupby(of_layer, key=lambda cell: (cell.mode, cell.context, cell.dtype, cell.width))
        for (mode, context, dtype, width), of_kind in kinds:
            cells = sorted(of_kind, key=lambda cell: cell.bucket)
            title = f"{_MODES[mode]}, {_CONTEXTS[context]}: {dtype}, {width} wide"
            parts.append(Section(title, [_table(cells)]))
        yield Section(layer, [*parts, *_lost(of_layer)], folded=False)
    facts = {**one.machine, **one.libraries}
    yield Section("Measured on", [{name: value for name, value in facts.items() if value}])


def _table(cells: Sequence[ChoiceCell]) -> Table:
    names = [name for name in dict.fromkeys(name for cell in cells for name in cell.times) if name != REFERENCE]
    rows = []
    for cell in cells:
        ratios = [f"{cell.ratio(name):.2f}" if name in cell.times else "" for name in names]
        time = f"{cell.times[REFERENCE] * 1e6:,.1f} us"
        rows.append(TableRow((cell.rows, short_name(cell.winner), time, *ratios), "green" * (cell.winner != REFERENCE)))
    columns = ("rows", "serves", "reference", *map(short_name, names))
    return Table(columns, rows, right={*columns} - {"serves"})


def _lost(cells: Sequence[ChoiceCell]) -> Iterator[object]:
    reasons = {name: reason for cell in cells for name, reason in _untimed(cell)}
    if reasons:
        yield Section("Not timed", [f"{short_name(name)}: {reason}" for name, reason in reasons.items()], folded=True)


def _untimed(cell: ChoiceCell) -> Iterator[tuple[str, str]]:
    return ((name, reason) for name, reason in cell.lost.items() if not reason.endswith(ALIAS))


def short_name(name: str) -> str:
    """Return the name of a candidate for a narrow column: a pack's, a repository's, a class without its packages.

    Example:
        >>> [short_name(n) for n in ("pack:liger:RMSNorm", "LayerRepository('acme/norms', version=1)", "a.b.Norm")]
        ['liger', 'acme/norms', 'Norm']
        >>> short_name("inductor of torch 2.13.0")
        'inductor of torch 2.13.0'
    """
    if name.startswith("pack:"):
        return name.split(":")[1]
    repository = re.search(r"Repository\('([^']+)'", name)
    return repository[1] if repository else name if " " in name else name.rpartition(".")[2]
