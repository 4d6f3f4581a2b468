"""`Grounds`: the decisions behind a receipt, in the process that made them, and the decision file that they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..environment import mapping_disabled
from ..errors import DecisionError, is_transient
from ..guards.limits import limits_of, unlimited
from ..models.receipt_row import ReceiptRow
from ..resolution import Resolution
from ..resolver import decide, find_drift
from ..warning import warn_once
from .content import in_program
from .file import DecisionFile
from .frozen import FrozenKernel, FrozenLayer, FrozenModel, hardware


@dataclass(frozen=True, eq=False)
class Grounds:
    """The decisions about the layers of a model, each with a row of its receipt.

    They hold kernels and classes, which no other process has: a receipt that is pickled leaves them behind.
    """

    model: str = ""
    decided: tuple[tuple[Resolution, ReceiptRow], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Grounds, ()

    def freeze(self) -> DecisionFile:
        """Return the decisions as a file has them; loads the kernels that serve what the first ones pass on."""
        if not self.decided:
            warn_once(
                f"No decision is frozen for {self.model or 'this model'}: its receipt lists no decorated layer or "
                "function. Put @use_kernelized_func(function) on the class of a module that finds a function in "
                "another way than by a name in its code; adopt(model) makes layers of an undecorated model dispatch."
            )
        groups: dict[tuple[str, int | None, str], dict[tuple[str, str], list[tuple[Resolution, ReceiptRow]]]] = {}
        for resolution, row in self.decided:
            request = resolution.request
            _check(resolution)
            kind = hardware(request.device)[0], request.capability, request.mode_text
            defined = in_program(request.layer.qualname if request.layer else "")
            groups.setdefault(kind, {}).setdefault((request.layer_name, defined), []).append((resolution, row))
        return DecisionFile(
            tuple(
                FrozenModel(
                    in_program(self.model), *kind, tuple(_layer(*at) for at in layers.items()), torch.__version__
                )
                for kind, layers in groups.items()
            )
        )


def _check(resolution: Resolution) -> None:
    """Refuse a decision that another machine, or this one a minute later, would not make again."""
    request, problem = resolution.request, ""
    if (drift := find_drift(resolution)) is not None:
        raise drift
    if mapping_disabled():
        problem = "DISABLE_KERNEL_MAPPING is on, so the reference serves: unset it"
    for refusal in resolution.refusals:
        if is_transient(refusal.error):
            problem = f"a kernel could not be reached, and may be later: {refusal}. Freeze where it can be reached"
    if problem:
        text = f"The decision about {request} cannot be frozen, for {problem}."
        raise DecisionError(text, layer=request.layer_name, found=problem, request=request)


def _layer(key: tuple[str, str], found: Iterable[tuple[Resolution, ReceiptRow]]) -> FrozenLayer:
    found = list(found)
    serving = {(each.origin, each.content): each for each, _ in found if not each.is_reference}
    if len(serving) > 1:  # of models that were kernelized in different scopes
        origins = " and ".join(origin for origin, _ in serving)
        raise DecisionError(
            f"Layer {key[0]!r} ({key[1]}) is served by {origins} at different paths, and a file has one decision for a "
            "layer, as calls have: kernelize the whole model at once, or give the layers different names.",
            layer=key[0],
            found=origins,
        )
    first = next(iter(serving.values()), found[0][0])
    paths: list[str] = []
    others: dict[str, str] = {}
    for _, row in found:
        for path in (row.path, *row.aliases):
            if row.origin == first.origin:
                paths.append(path)
            else:
                others[path] = f"{row.origin} ({row.note})" if row.note else row.origin
    return FrozenLayer(*key, tuple(paths), tuple(_kernels(first)), others, first.note)


def _kernels(first: Resolution) -> Iterator[FrozenKernel]:
    """Yield the kernel of a decision, and those that serve the calls which it declares not to take."""
    for resolution in serving(first):
        candidate = resolution.candidate
        yield FrozenKernel(
            in_program(candidate.label if candidate else ""),
            in_program(resolution.origin),
            resolution.content,
            resolution.plugin,
            resolution.pin,
            # The names of candidates are in it: that of the program, in place of `__main__`, as in `source`.
            json.loads(in_program(json.dumps(candidate.record))) if candidate else None,
        )


def serving(first: Resolution) -> Iterator[Resolution]:
    """Yield a decision for a kernel, and those for the calls which it declares not to take."""
    resolution, request, number = first, first.request, 0
    while resolution.implementation is not None:
        yield resolution
        limited = unlimited(resolution.implementation) is not resolution.implementation
        # One that returns `NotImplemented` undeclared may do so for no call: what is next would be loaded for nothing.
        if request.layer is None or not (limited or limits_of(resolution.kernel_layer)):
            break
        number += 1
        resolution = decide(request.layer, request.device, request.modes, scopes=request.scopes, after=number)
        if len(resolution.request.passed_on) < number:  # it was the reference, which passes nothing on
            break
