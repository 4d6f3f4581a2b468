"""`ranked`: candidates in the order that was measured, each with a limit where winners differ by shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch

from kernels_core import ArgumentError, Candidate, LayerRequest, Mode, Reference, warn_once

from ..numerics.wanted import required
from .cell import REFERENCE, ChoiceCell, settled
from .choice import Choice
from .limit import Orders, ShapeLimit

PLUGIN = "choice"
"""The plugin that offers candidates again which took part in a race, and are not offered otherwise."""


def name_of(candidate: Candidate) -> str:
    """Return the name of a candidate in measurements."""
    return REFERENCE if candidate.source is Reference else candidate.label


def ranked(
    request: LayerRequest, candidates: Sequence[Candidate], choice: Choice, file: str, strict: bool
) -> list[Candidate] | None:
    """Return the candidates to try, best first; None where nothing was measured."""
    layer = request.layer
    about = [
        cell
        for cell in choice.cells_on(request.device, strict=strict)
        if cell.layer == request.layer_name and (cell.context == "compiled") == request.is_traced
    ]
    if layer is None or layer.kind or not about:  # a coroutine or generator passes no call on
        _say_if_foreign(request.device, choice, file, strict)
        return None
    mode: Literal["training", "inference"] = "training" if Mode.TRAINING in request.mode else "inference"
    cells = [cell for cell in about if cell.mode == mode]
    if not cells:
        return None
    known = {name for cell in cells for name in (*cell.times, *cell.lost)}
    new = [candidate for candidate in candidates if name_of(candidate) not in known]
    if new:
        warn_once(
            f"{new[0].label} is offered for layer {request.layer_name!r}, and {file} has no measurement of it: the "
            "default order of candidates serves. Measure again: kernels-core choose.",
        )
        return None
    offered = {name_of(candidate): candidate for candidate in reversed(candidates)}  # of two with one name, the first
    offered = {**_again(known - offered.keys(), request.layer_name), **offered}
    gone = sorted({cell.winner for cell in cells} - offered.keys())
    if gone:
        warn_once(
            f"For layer {request.layer_name!r}, {file} has {', '.join(gone)} as the fastest, and nothing offers it: "
            "the next best serves. Offer it, such as in a mapping, or measure again: kernels-core choose.",
        )
    # What is not offered any more wins nothing, and the next best does.
    cells = [replace(one, times={name: one.times[name] for name in one.times if name in offered}) for one in cells]
    served = list(zip(cells, settled(cells), strict=True))
    if "batch_invariant" in required(request):  # two winners would give a row other bits by the number of rows
        served = _one_winner(served)
    chain = _chain(served)
    rest = [name for name in map(name_of, candidates) if name not in chain and name != REFERENCE]
    orders = None
    if len({order[0] for _, order in served}) > 1:
        chain = [*(name for name in chain if name != REFERENCE), *rest]
        eager = [(cell.key, order) for cell, order in served if cell.context != "captured"]
        captured = [(cell.key, order) for cell, order in served if cell.context == "captured"]
        default = (*dict.fromkeys([*map(name_of, candidates), REFERENCE]),)
        orders = Orders(request.layer_name, tuple(eager), tuple(captured), default, file)
        if any(order[0] == REFERENCE for order in (default, *(order for _, order in served))):
            chain.append(REFERENCE)  # the last one, for it passes no call on; where it wins nothing, it is a fallback
    digests = {name: digest for cell in cells for name, digest in cell.digests.items()}
    note = f"by {file}: {described(served, gone)}"
    found: list[Candidate] = []
    for place, name in enumerate(chain):
        limit = None
        if name != REFERENCE:
            rivals = (*chain[place + 1 :], REFERENCE)
            limit = ShapeLimit(
                name,
                rivals,
                orders,
                digests.get(name, ""),
                layer.is_function,
                request.is_traced,
                (choice, file, strict),
            )
        record = orders.record if orders is not None else None
        found.append(replace(offered[name], limit=limit, note=note, record=record))
    return found


Served = Sequence[tuple[ChoiceCell, tuple[str, ...]]]
"""Cells, each with the candidates that serve it, best first."""


def _one_winner(served: Served) -> list[tuple[ChoiceCell, tuple[str, ...]]]:
    """Return the same with one winner for all cells: the one that takes the least time, relative to the reference."""
    everywhere = set.intersection(*({*cell.times} - {*cell.lost} for cell, _ in served))
    if not everywhere:
        return list(served)
    # Sorted: of two that are equal, all processes take the same one.
    first = min(sorted(everywhere), key=lambda name: sum(cell.ratio(name) for cell, _ in served))
    return [(cell, (first, *(name for name in order if name != first))) for cell, order in served]


def _chain(served: Served) -> list[str]:
    """Return the winners in the order in which calls ask them: that of few rows, where launching takes long, first."""
    winners = {order[0] for _, order in served}
    if winners == {REFERENCE}:
        return [REFERENCE]
    if len(winners) == 1:  # where it cannot serve, the others that always win do
        always = set.intersection(*(set(order[: order.index(REFERENCE)]) for _, order in served))
        return [name for name in served[0][1] if name in always]
    by_rows = sorted(served, key=lambda pair: (pair[0].context == "captured", pair[0].bucket))
    return list(dict.fromkeys(order[0] for _, order in by_rows))


def _again(names: Iterable[str], layer_name: str) -> dict[str, Candidate]:
    """Return those that nothing offers here, but that took part in the race: the reference, and those of packs."""
    from ..packs.source import as_pack

    found = {REFERENCE: Candidate(Reference, PLUGIN, "user")}
    for name in names:
        if name.startswith("pack:"):
            with contextlib.suppress(ArgumentError):  # a pack that this program has not
                found[name] = Candidate(as_pack(name, f"layer {layer_name!r}", layer_name), PLUGIN, "user")
    return found


def described(served: Served, gone: Sequence[str]) -> str:
    """Return in words which candidate serves which rows, by how much it wins, what lost, and what is not offered."""
    texts = []
    places = sorted(served, key=lambda pair: (pair[0].dtype, pair[0].width, pair[0].context, pair[0].bucket))
    alike = groupby(places, key=lambda pair: (pair[0].dtype, pair[0].width, pair[0].context, pair[1][0]))
    for (dtype, width, context, winner), run in alike:
        cells = [cell for cell, _ in run]
        first, last = cells[0].rows.partition("-")[0], cells[-1].rows.rpartition("-")[2]
        rows = first if first == last else f"{first}-{last}"
        ratios = [cell.ratio(winner) for cell in cells]
        span = "-".join(dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}")))
        gain = f"{span} of the reference's time"
        if winner == REFERENCE:
            beaten = all(min(cell.times.values()) == cell.times[REFERENCE] for cell in cells)
            gain = "measured faster for this shape" if beaten else "no other is faster for this shape"
            gain = "the fastest that is offered here" if gone else gain
        lost = [
            f"{name} {min(cell.times.get(name, float('inf')) / cell.times[REFERENCE] for cell in cells):.2f}"
            for name in cells[0].order
            if name not in (winner, REFERENCE)
        ]
        others = f" (lost: {', '.join(lost)})" if lost else ""
        where = " in CUDA graphs" if context == "captured" else ""
        unit = "row" if rows == "1" else "rows"
        texts.append(f"{rows} {unit} of {width} {dtype}{where}: {winner}, {gain}{others}")
    return "; ".join([*texts, *(f"{name} won, and is not offered here" for name in gone)])


def _say_if_foreign(device: torch.device, choice: Choice, file: str, strict: bool) -> None:
    same_type = [one for one in choice.machines if one.machine.get("device") == device.type]
    if same_type and not choice.cells_on(device, strict=strict):
        measured = ", ".join(f"{key} {value}" for key, value in same_type[0].machine.items())
        warn_once(
            f"{file} was measured on another machine ({measured}): the default order of candidates serves. Measure on "
            "this one: kernels-core choose adds to the file.",
        )
