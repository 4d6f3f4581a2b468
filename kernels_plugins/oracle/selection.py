"""Which kernel runs while something is tried: one candidate by itself, or none."""

from __future__ import annotations

import types
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels_core import Candidate, Layer, LayerRequest, Mode, Refusal, Resolution, Scope, resolve


@dataclass(eq=False)
class Selection:
    """The payload of a scope in which not every candidate may serve.

    Attributes:
        candidate: The only one that may; None for none.
        offers: What plugins offered while it was open.
    """

    candidate: Candidate | None = None
    offers: list[Candidate | Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class Offers:
    """What there is for a layer.

    Attributes:
        candidates: What may be tried, in the order in which it would be.
        misfits: What is offered for other devices or modes.
        note: Why nothing was asked for, where that is so.
    """

    candidates: tuple[Candidate, ...]
    misfits: tuple[Refusal, ...]
    note: str = ""


def references() -> Scope:
    """Return a scope in which every decorated layer runs its reference."""
    return Scope(Selection())


def offers(layer: Layer, device: torch.device, mode: Mode) -> Offers:
    """Return what plugins offer for calls of one mode, without loading anything."""
    selection = Selection(candidate=Candidate(None))
    with Scope(selection):
        resolution = decide(layer, device, mode)
    candidates = [offer for offer in selection.offers if isinstance(offer, Candidate)]
    misfits = [offer for offer in selection.offers if isinstance(offer, Refusal)]
    tiers = ("scope", "user", "plugin")
    candidates.sort(key=lambda c: (tiers.index(c.tier), -c.priority, c.plugin if c.tier == "plugin" else ""))
    return Offers(tuple(candidates), tuple(misfits), resolution.note)


def decided(layer: Layer, candidate: Candidate, device: torch.device, mode: Mode) -> Resolution:
    """Return what would be decided about a layer if one candidate were the only one; may fetch and import it."""
    with Scope(Selection(candidate)):
        return decide(layer, device, mode)


def decide(layer: Layer, device: torch.device, mode: Mode) -> Resolution:
    """Return what would be decided about a layer."""
    return resolve(types.SimpleNamespace(kernels_layer=layer), device=device, mode=mode)  # type: ignore[arg-type]


# --- For the plugin -------------------------------------------------------------------------------


def selection_of(request: LayerRequest) -> Selection | None:
    """Return the innermost selection that counts for a request."""
    return next((payload for payload in request.scopes if isinstance(payload, Selection)), None)


def only_reference(request: LayerRequest) -> Resolution | None:
    """Answer for layers that are to run their reference."""
    selection = selection_of(request)
    if selection is None or selection.candidate is not None:
        return None
    return Resolution(request, note="only references run while kernels are compared with them")


def only_selected(request: LayerRequest) -> Generator[None, Any, Any]:
    """Leave out what is not selected: a wrapper of `kernels_find_candidates`."""
    answers: list[Sequence[Candidate | Refusal]] = yield
    selection = selection_of(request)
    if selection is None or selection.candidate is None:
        return answers
    selection.offers += [offer for answer in answers for offer in answer if _candidate(offer) is not None]
    chosen = selection.candidate
    kept = [offer for answer in answers for offer in answer if _is(offer, chosen)]
    return [kept[:1]]  # of equal ones, one


def _candidate(offer: Candidate | Refusal) -> Candidate | None:
    return offer if isinstance(offer, Candidate) else offer.candidate


def _is(offer: Candidate | Refusal, chosen: Candidate) -> bool:
    if not isinstance(offer, Candidate) or (offer.plugin, offer.tier) != (chosen.plugin, chosen.tier):
        return False
    return offer.source is chosen.source or bool(offer.source == chosen.source)
