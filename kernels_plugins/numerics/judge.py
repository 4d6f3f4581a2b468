"""Implementations of a layer, judged on one of its calls: the rows of `verify`, and what decisions ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from kernels_core import NUMERICS, Mode, Resolution

from ..oracle.inputs import Recorded
from ..oracle.report import Verdict, VerifyRow
from ..oracle.subject import Subject, dtype_of
from . import store
from .invariance import BACKWARD, NOT_TAKEN, Judgement, joined
from .properties import find
from .rows import SILENT
from .wanted import trying

Forward = Callable[..., Any]
_VERDICTS: dict[bool | None, Verdict] = {True: "ok", False: "wrong", None: "undecided"}


def judged(
    recorded: Recorded, resolution: Resolution, names: Iterable[str], *, mode: Mode | None = None, every: bool = False
) -> dict[str, Judgement]:
    """Return findings about the implementation of a decision, for a call: earlier ones of such calls, or new ones.

    Earlier ones in which not every number of rows was tried are made again where `every` is to be. `mode` is that of
    the call, where the decision serves others, too.
    """
    names, training = list(names), Mode.TRAINING in (mode or resolution.request.mode)
    layer, call = recorded.layer, recorded.call
    implementation = resolution.implementation or layer.reference
    key, kind = store.key_of(layer, implementation, resolution.request.device), store.kind_of(call, implementation)
    found = store.findings(key, kind, resolution.candidate)
    wanted = [*names, *([BACKWARD] if training and "batch_invariant" in names else [])]
    if new := [name for name in wanted if name not in found or (every and _is_sample(name, found[name]))]:
        compiles, token = resolution.can_be_traced, trying.set(True)
        try:
            found.update(find(call, implementation, layer.reference, new, compiles=compiles, every=every))
        finally:
            trying.reset(token)
        taken = {name: one for name, one in found.items() if one.why not in (NOT_TAKEN, SILENT)}
        store.keep(key, kind, taken, resolution.candidate)
    found = joined(found, training=training)
    return {name: found[name] for name in NUMERICS if name in names}


def _is_sample(name: str, finding: Judgement) -> bool:
    return name in ("batch_invariant", BACKWARD) and bool(finding.has) and not finding.every


def numeric_rows(
    recorded: Recorded, subject: Subject, names: Iterable[str], *, every: bool = False
) -> Iterator[VerifyRow]:
    """Yield a row for each property that is asked for, or that a kernel declares, and each implementation.

    The reference is judged on those that are asked for.
    """
    asked = list(names)
    reference = Resolution(replace(subject.request, mode=subject.modes[-1]))
    blank = replace(subject.blank, mode="inference", case="numerics", dtype=dtype_of(recorded.call))
    for row, resolution in [
        *subject.serving,
        *([(replace(blank, origin=reference.origin), reference)] if asked else []),
    ]:
        declared = [name for name in NUMERICS if resolution.declares(name)]
        wanted = [name for name in NUMERICS if name in (*asked, *declared)]
        row = replace(row, case=blank.case, dtype=blank.dtype, mode=blank.mode)
        if not wanted or not subject.begin(row):
            continue
        for name, finding in judged(recorded, resolution, wanted, every=every).items():
            why = finding.why if finding.has is not True else ""
            if why and name in declared:
                why = f"it declares {name} = True, and that is not so: {why}" if finding.has is False else why
            verdict = "refused" if why == NOT_TAKEN else _VERDICTS[finding.has]
            yield replace(row, subject=name, verdict=verdict, reason=why)
