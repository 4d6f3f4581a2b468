"""Plugin `inductor`: the layer's own forward, compiled by PyTorch, as a candidate for eager calls.

Licence: that of PyTorch, BSD. Tried with PyTorch 2.13 on CPUs. Served only where a mapping names `"pack:inductor"`:
compiling takes seconds, and on a CPU a C++ compiler. Limits: the whole forward has to compile as one graph, in as many
variants as PyTorch allows for one function (8); no second derivatives. If one of these fails, the reference serves.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from kernels_core import KernelLayer, Layer, LoadedLayer, hookimpl


def _own(function: Any) -> Any:
    """Return a copy of a function: PyTorch counts variants by code object, which several layers may share."""
    if type(function) is not types.FunctionType:
        return function
    code, name = function.__code__.replace(), function.__name__
    copied = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__, copied.__qualname__ = function.__kwdefaults__, function.__qualname__
    copied.__dict__.update(function.__dict__)
    return copied


def _compiled(layer: Layer) -> KernelLayer:
    # fullgraph: a graph that breaks, or one variant too many, raises with a reason, rather than run eagerly in silence
    forward = torch.compile(_own(layer.reference), fullgraph=True)
    return cast(KernelLayer, forward if layer.is_function else type("Compiled", (nn.Module,), {"forward": forward}))


class _Unbound(nn.Module):
    """Answers requests about a layer name only: there is nothing to compile yet."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Fail: no call comes here."""
        raise NotImplementedError


def _load(layer_name: str, device: torch.device) -> LoadedLayer:
    return LoadedLayer(_Unbound, f"inductor of torch {torch.__version__}", adapt=_compiled)


@hookimpl
def kernels_packs() -> Mapping[str, Callable[..., object]]:
    """Offer the pack, for all layer names and devices."""
    return {"inductor": _load}
