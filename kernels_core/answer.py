"""The core's own answer: find and rank candidates, then authorize, load and check each in turn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from .contract import check_contract, check_mode
from .decisions.replay import replaying
from .errors import ContractError, ResolutionError, UntrustedError
from .guards.limits import limits_of
from .guards.quarantine import Quarantined, excluded_dtypes, find_denied, find_quarantined
from .guards.shards import misplaced, on_shards, runs_on_shards
from .guards.tensors import check_tensors
from .hookspecs import hookimpl
from .layer import Forward
from .loading import limited_implementation, load, reason_of, source_key
from .mode import TRACED_MODES, Mode
from .plugins import plugin_manager
from .resolution import (
    Candidate,
    Cause,
    KernelLayer,
    LayerRequest,
    LoadedLayer,
    Reference,
    Refusal,
    Resolution,
    rank_offers,
    tiers_of,
)
from .warning import warn_once

IN_QUARANTINE = "it is in quarantine"
"""How the reason starts for a kernel that proved wrong in this process."""


class ModesDiffer(BaseException):
    """One decision cannot serve all modes that were asked about: decide for each, when a call of that mode comes.

    It is no `Exception`: it is no fault that a wrapper of a hook, or the isolation of plugins, should handle.
    """


@dataclass(frozen=True)
class CorePlugin:
    """Answers `kernels_resolve_forward` where no other plugin does, from the candidates of plugins or only one."""

    only: Candidate | None = None

    @hookimpl(trylast=True)
    def kernels_resolve_forward(self, request: LayerRequest) -> Resolution:
        """Try the candidates in order: authorize, load, check. The first without a refusal serves."""
        manager = plugin_manager()
        hook = manager.hook
        answers = hook.kernels_find_candidates(request=request) if self.only is None else [[self.only]]
        if (training := _for_all_modes(request, answers)) is not None:
            request = training
            answers = hook.kernels_find_candidates(request=request) if self.only is None else [[self.only]]
        candidates, misfits, refusals = rank_offers(answers)
        if self.only is None:
            ranked = _ranked(hook, request, answers, candidates)
            if ranked is None and (rivals := find_rivals(candidates)):  # no error: the rule says which serves
                warn_once(describe_tie(request.layer_name, rivals))
            candidates = candidates if ranked is None else ranked
        if request.depends_on_mode and _differ_by_mode(request, candidates):
            raise ModesDiffer
        for candidate in candidates:
            if isinstance(candidate.source, type(Reference)):  # no policy can refuse it: it is the model's own code
                by = f"plugin {candidate.plugin!r} offers" if candidate.tier == "plugin" else "the mapping names"
                return Resolution(request, refusals=tuple(refusals), note=candidate.note or f"{by} it")
            if entry := find_denied(request, candidate):  # of what is denied, nothing is fetched
                refusals.append(quarantine_refusal(entry, candidate))
            elif vetoes := manager.vetoes(request, candidate):  # asked before code is fetched or imported
                refusals.append(replace(_refusal(UntrustedError, request, candidate, vetoes), cause=Cause.POLICY))
            elif isinstance(loaded := load(request, candidate), Refusal):
                refusals.append(loaded)
            elif isinstance(kernel := _fitting(request, candidate, loaded), Refusal):
                refusals.append(kernel)
            # Plugins judge only kernels that fit the layer.
            elif vetoes := hook.kernels_check_layer(request=request, candidate=candidate, layer=loaded.layer):
                refusals.append(_refusal(ContractError, request, candidate, vetoes))
            else:
                return Resolution(
                    request,
                    kernel,
                    candidate,
                    loaded.origin,
                    tuple(refusals),
                    loaded.checked,
                    misfits=misfits,
                    kernel_layer=loaded.layer,
                    inference_only=not getattr(loaded.layer, "has_backward", True),
                    provenance=loaded.provenance,
                    pin=loaded.pin,
                    loaded_content=loaded.content,
                )
        return Resolution(request, refusals=tuple(refusals), misfits=misfits)


def _for_all_modes(request: LayerRequest, answers: list[list[Any]]) -> LayerRequest | None:
    """Return the request for training, where a candidate wants that kernel for inference, too; None where none does."""
    mode = request.modes[-1]
    training = TRACED_MODES[1] if Mode.TORCH_COMPILE in mode else Mode.TRAINING
    if request.modes == (training,):
        return None
    for offer in itertools.chain.from_iterable(answers):
        candidate = offer.candidate if isinstance(offer, Refusal) else offer
        if isinstance(candidate, Candidate) and candidate.same_for_all_modes:
            return request.in_mode(training)
    return None


def _ranked(
    hook: Any, request: LayerRequest, answers: list[list[Any]], candidates: list[Candidate]
) -> list[Candidate] | None:
    """Return the candidates in the order that a plugin chooses, without tiers that an `Exclusive` leaves out.

    A decision file that is replayed comes before that: a plugin is asked only where it has measured the decisions.
    """
    replay = replaying.get()
    if replay is not None:
        candidates = replay.ranked(request, candidates)
        if not candidates or candidates[0].record is None:
            return candidates
    ranked = hook.kernels_rank_candidates(request=request, candidates=candidates)
    if ranked is None and replay is not None:
        return replay.unusable("no plugin applies its measured choice: KERNELS_PLUGINS leaves out 'choice'.")
    if ranked is None:
        return None
    tiers = tiers_of(itertools.chain.from_iterable(answers))
    return [one for one in ranked if one.tier in tiers or isinstance(one.source, type(Reference))]


def _differ_by_mode(request: LayerRequest, candidates: list[Candidate]) -> bool:
    """Return whether the candidates for the second mode are not those for the first one."""
    other = request.in_mode(request.modes[1])
    hook = plugin_manager().hook
    answers = hook.kernels_find_candidates(request=other)
    offered = rank_offers(answers)[0]
    ranked = _ranked(hook, other, answers, offered)
    first, second = (
        [(source_key(one.source), one.tier, one.plugin, one.limit) for one in found]
        for found in (candidates, offered if ranked is None else ranked)
    )
    return first != second


def find_rivals(candidates: list[Candidate]) -> list[str]:
    """Return the plugins that share the top with an equal priority, so that only their names decide."""
    if len(candidates) < 2:
        return []
    top = [(c.tier, c.priority) for c in candidates[:1]]
    rivals = sorted({c.plugin for c in candidates if c.tier == "plugin" and (c.tier, c.priority) in top})
    return rivals if len(rivals) > 1 else []


def describe_tie(layer_name: str, rivals: list[str]) -> str:
    """Return the warning of such plugins."""
    first, *others = rivals
    return (
        f"Plugins {', '.join(rivals)} offer kernels for layer {layer_name!r} with equal "
        f"priority: {first!r} goes first, by name. Give one of them a larger kernels_priority, block one "
        f"with KERNELS_PLUGINS=-{others[0]}, or register the one that you want."
    )


def _fitting(request: LayerRequest, candidate: Candidate, loaded: LoadedLayer) -> Forward | Refusal:
    """Return the function that serves, or why not: the contract, the mode, the candidate's limit, a quarantine."""
    kernel = loaded.layer
    if reason := check_contract(request.layer, kernel):
        return _refusal(ContractError, request, candidate, [reason])
    if reason := check_mode(request, kernel):
        return replace(_refusal(ContractError, request, candidate, [reason]), cause=Cause.MODE)
    if request.subclasses and (reason := check_tensors(request.subclasses, kernel)):
        return _refusal(ContractError, request, candidate, [reason])
    try:
        forward = limited_implementation(request.layer, candidate, loaded)
        if request.subclasses and request.layer is not None and runs_on_shards(request.subclasses, kernel):
            forward = on_shards(request.layer, kernel, forward)
    except Exception as error:  # of the plugin that limits it: a reason like any other
        limit = "" if candidate.limit is None or isinstance(error, ResolutionError) else "its limit: "
        return Refusal(limit + reason_of(error, candidate), candidate, candidate.plugin, error)
    return exclusion(request, candidate, forward, loaded.origin, kernel) or forward


def exclusion(
    request: LayerRequest, candidate: Candidate, implementation: Forward, origin: str, kernel: KernelLayer | None
) -> Refusal | None:
    """Return the refusal of a kernel that is in quarantine, or has passed on the call that a request is about."""
    entry = find_quarantined(request, implementation, origin, candidate.plugin)
    if entry is not None:
        return quarantine_refusal(entry, candidate)
    if not request.passed_on or all(passed is not implementation for passed in request.passed_on):
        return None
    served = Resolution(request, implementation, candidate, origin, kernel_layer=kernel)
    excluded = excluded_dtypes(served)
    reason = not_taken(served) or "it passes some calls on (it returns NotImplemented)"
    error = next((entry.error for entry in excluded.values()), None)
    return Refusal(reason, candidate, candidate.plugin, error, Cause.POLICY if excluded else Cause.MODE)


def not_taken(resolution: Resolution) -> str:
    """Return in words the calls that the kernel of a decision passes on, as far as it is known; else an empty text."""
    dtypes = excluded_dtypes(resolution).items()
    out = [f"it is in quarantine for {dtype}: {entry.reason}" for dtype, entry in dtypes]
    out += [resolution.candidate.note] if resolution.candidate is not None else []
    out += [limits_of(resolution.kernel_layer), misplaced(resolution.implementation)]
    return "; ".join(filter(None, out))


def _refusal(kind: type[ResolutionError], request: LayerRequest, candidate: Candidate, reasons: list[str]) -> Refusal:
    reason = "; ".join(reasons)
    return Refusal(reason, candidate, candidate.plugin, kind(f"{candidate.label}: {reason}", request=request))


def quarantine_refusal(entry: Quarantined, candidate: Candidate) -> Refusal:
    """Return the refusal of a candidate whose kernel is in quarantine."""
    cause = Cause.POLICY if entry.mode is None else Cause.MODE
    return Refusal(f"{IN_QUARANTINE}: {entry.reason}", candidate, candidate.plugin, entry.error, cause)
