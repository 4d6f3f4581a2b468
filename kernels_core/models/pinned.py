"""Decorated functions that a kernelized module calls: their choices serve in a scope around its forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..contract import check_call
from ..guards.quarantine import find_quarantined, names_of
from ..layer import Forward, Layer
from ..mode import Mode
from ..resolution import LayerRequest, Refusal, Resolution
from ..resolver import Decided, decide
from ..scopes.scope import ForwardScope
from ..torch_internals import constant_result
from ..warning import warn


def pinned(forward: Forward, functions: Mapping[Layer, Resolution]) -> Forward:
    """Return a forward that runs in a scope in which the chosen functions serve."""

    def choice_for(request: LayerRequest) -> Resolution | None:
        """Return the choice for a function, unless it is for another device or its kernel is in quarantine."""
        layer = request.layer
        choice = functions.get(layer) if layer is not None else None
        if layer is None or choice is None or choice.request.device != request.device:
            return None
        if choice.is_provisional or (choice.inference_only and Mode.TRAINING in request.mode):
            return None
        kernel = choice.implementation
        if any(passed is kernel for passed in request.passed_on):  # the next candidate is one of the same scopes
            anew = functools.partial(decide, subclasses=request.subclasses, passed_on=request.passed_on)
            found = anew(layer, request.device, request.modes, scopes=choice.request.scopes)
            return replace(found, request=request)
        if kernel is not None and find_quarantined(request, kernel, *names_of(choice)):
            return None
        if reason := check_call(choice, request.subclasses, traced=request.is_traced):
            return Resolution(request, refusals=(Refusal(reason, choice.candidate, choice.plugin),))
        return replace(choice, request=request)

    scope = ForwardScope(Decided(choice_for))

    @constant_result
    def compare() -> None:
        """Warn of functions that compiled code gets from another place; runs at trace time, outside of the graph."""
        for layer, choice in functions.items():
            found = decide(layer, choice.request.device, (choice.request.mode | Mode.TORCH_COMPILE,), notify="plugins")
            if found.implementation is not choice.implementation:
                warn(
                    f"Function {layer.qualname} was kernelized with {choice.origin}, but compiled code gets the "
                    f"kernel that is mapped where it is traced: {found.origin}. Register the mapping for the process.",
                )

    @functools.wraps(forward)
    def in_scope(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # Dynamo cannot open a scope inside of its graph
            compare()
            return forward(self, *args, **kwargs)
        with scope:
            return forward(self, *args, **kwargs)

    in_scope.__dict__.pop("kernels_layer", None)
    return in_scope
