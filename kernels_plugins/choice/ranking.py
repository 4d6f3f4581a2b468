"""`ranked`: candidates in the order that was measured, each with a limit where winners differ by shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch

from kernels_core import ArgumentError, Candidate, LayerRequest, Mode, Reference, warn_once

from .cell import REFERENCE, ChoiceCell, best_everywhere
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
    offered = {name_of(candidate): candidate for candidate in reversed(candidates)}
    offered = {**_again(known - offered.keys(), request.layer_name), **offered}
    cells = [replace(one, times={name: one.times[name] for name in one.times if name in offered}) for one in cells]
    chain = _chain(cells)
    rest = [name for name in map(name_of, candidates) if name not in chain and name != REFERENCE]
    orders = None
    if best_everywhere(cells) is None:
        chain = [*(name for name in chain if name != REFERENCE), *rest]
        eager = [(cell.key, cell.order) for cell in cells if cell.context != "captured"]
        captured = [(cell.key, cell.order) for cell in cells if cell.context == "captured" and cell.device == "cuda"]
        default = (*dict.fromkeys([*map(name_of, candidates), REFERENCE]),)
        orders = Orders(request.layer_name, tuple(eager), tuple(captured), default, file)
        if any(order[0] == REFERENCE for order in (default, *(cell.order for cell in cells))):
            chain.append(REFERENCE)  # the last one, for it passes no call on; where it wins nothing, it is a fallback
    digests = {name: digest for cell in cells for name, digest in cell.digests.items()}
    note = f"by {file}: {described(cells)}"
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
        found.append(replace(offered[name], limit=limit, note=note))
    return found


def _chain(cells: Sequence[ChoiceCell]) -> list[str]:
    """Return the winners in the order in which calls ask them: that of few rows, where launching takes long, first."""
    launched = [cell for cell in cells if cell.context != "captured"] or list(cells)
    everywhere = best_everywhere(cells)
    if everywhere == REFERENCE:
        return [REFERENCE]
    if everywhere is not None:  # where it cannot serve, the others that always win do
        return [everywhere, *(name for name in cells[0].order if name != everywhere and _always_wins(name, cells))]
    winners = dict.fromkeys(cell.winner for cell in sorted(launched, key=lambda cell: cell.bucket))
    winners.update(dict.fromkeys(cell.winner for cell in cells))
    return list(winners)


def _always_wins(name: str, cells: Sequence[ChoiceCell]) -> bool:
    return all(name in cell.order[: cell.order.index(REFERENCE)] for cell in cells)


def _again(names: Iterable[str], layer_name: str) -> dict[str, Candidate]:
    """Return those that nothing offers here, but that took part in the race: the reference, and those of packs."""
    from ..packs.source import as_pack

    found = {REFERENCE: Candidate(Reference, PLUGIN, "user")}
    for name in names:
        if name.startswith("pack:"):
            with contextlib.suppress(ArgumentError):  # a pack that this program has not
                found[name] = Candidate(as_pack(name, f"layer {layer_name!r}", layer_name), PLUGIN, "user")
    return found


def described(cells: Sequence[ChoiceCell]) -> str:
    """Return in words which candidate serves which rows, by how much it wins, and what lost."""
    texts = []
    places = sorted(cells, key=lambda cell: (cell.dtype, cell.width, cell.context, cell.bucket))
    for (dtype, width, context), group in groupby(places, key=lambda cell: (cell.dtype, cell.width, cell.context)):
        for winner, run in groupby(group, key=lambda cell: cell.winner):
            run_of = list(run)
            first, last = run_of[0].rows.partition("-")[0], run_of[-1].rows.rpartition("-")[2]
            rows = first if first == last else f"{first}-{last}"
            ratios = [cell.ratio(winner) for cell in run_of]
            span = "-".join(dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}")))
            gain = f"{span} of the reference's time"
            if winner == REFERENCE:
                beaten = all(min(cell.times.values()) == cell.times[REFERENCE] for cell in run_of)
                gain = "measured faster for this shape" if beaten else "no other is faster for this shape"
            lost = [
                f"{name} {min(cell.times.get(name, float('inf')) / cell.times[REFERENCE] for cell in run_of):.2f}"
                for name in run_of[0].order
                if name not in (winner, REFERENCE)
            ]
            others = f" (lost: {', '.join(lost)})" if lost else ""
            where = " in CUDA graphs" if context == "captured" else ""
            unit = "row" if rows == "1" else "rows"
            texts.append(f"{rows} {unit} of {width} {dtype}{where}: {winner}, {gain}{others}")
    return "; ".join(texts)


def _say_if_foreign(device: torch.device, choice: Choice, file: str, strict: bool) -> None:
    same_type = [one for one in choice.machines if one.machine.get("device") == device.type]
    if same_type and not choice.cells_on(device, strict=strict):
        measured = ", ".join(f"{key} {value}" for key, value in same_type[0].machine.items())
        warn_once(
            f"{file} was measured on another machine ({measured}): the default order of candidates serves. Measure on "
            "this one: kernels-core choose adds to the file.",
        )
