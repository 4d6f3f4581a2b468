"""Plugin `inductor`: the layer's own forward, compiled by PyTorch, as a candidate for eager calls.

Licence: that of PyTorch, BSD. Tried with PyTorch 2.13 on CPUs. Served only where a mapping names `"pack:inductor"`:
compiling takes seconds, and on a CPU a C++ compiler. Limits: the whole forward has to compile as one graph; a
layer has code for 16 kinds of calls, and one for the others, each with as many variants as PyTorch allows (8), past
which calls run eager, as do those under transforms of `torch.func`, and those of a module whose parts have hooks; no
second derivatives, and one backward for each forward.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kernels_core import KernelLayer, Layer, LoadedLayer, hookimpl, warn_once
from kernels_core.torch_internals import has_global_hooks, in_transform, run_only

_LIMIT = re.compile("Limit(Hit|Exceeded)$")
_KINDS = 16
"""How many kinds of calls of one layer have compiled code of their own, before all others share one."""


def _kind(values: Iterable[Any]) -> object:
    """Return the kind of a call, which has compiled code of its own: one for all would soon have too many variants."""
    for value in values:
        if isinstance(value, torch.Tensor):
            *sizes, width = value.shape or (1,)
            width = width if value.is_floating_point() else min(width, 2)
            return torch.is_grad_enabled(), value.dtype, *[min(size, 2) for size in sizes], width
    return torch.is_grad_enabled()


def _hooked(parts: Iterable[Any]) -> bool:
    """Whether one of these is a module with hooks, or has one in it: compiled code does not notice later ones."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return bool(modules) and (
        any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
        or has_global_hooks()
        or any(_hooked(m._modules.values()) for m in modules)
    )


def _compiled(layer: Layer) -> KernelLayer:
    reference = layer.reference
    compiled: dict[object, Any] = {}

    def inlined(*args: Any, **kwargs: Any) -> Any:
        return reference(*args, **kwargs)

    def compiled_for(kind: object) -> Any:
        if kind not in compiled:
            # PyTorch counts variants by code object: a copy gives each its own, also where classes share a forward.
            own = types.FunctionType(inlined.__code__.replace(), globals(), closure=inlined.__closure__)
            compiled[kind] = torch.compile(own, fullgraph=True)  # a graph that breaks raises with a reason
        return compiled[kind]

    @functools.wraps(reference)
    def forward(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if in_transform() or _hooked(values if layer.is_function else (*args[0]._modules.values(), *values[1:])):
            return reference(*args, **kwargs)  # compiled code can be in no transform
        if (kind := _kind(values)) not in compiled and len(compiled) >= _KINDS:
            kind = None
        try:
            return compiled_for(kind)(*args, **kwargs)
        except Exception as error:
            if not _LIMIT.search(type(error).__name__):  # its class is private, and has had three names
                raise
            # Runs what is compiled; each call that asks for one variant too many costs milliseconds.
            compiled[kind] = run_only(inspect.unwrap(compiled[kind]))
            few = "is compiled for as many variants of a call as PyTorch allows for one function: others run eager"
            warn_once(f"Layer {layer.name!r} {few}.")
        return reference(*args, **kwargs)

    # It is no wrapper of the reference, of which findings would be taken for those about compiled code.
    vars(forward)["__signature__"] = inspect.signature(vars(forward).pop("__wrapped__"))
    return forward if layer.is_function else type("Compiled", (nn.Module,), {"forward": forward})


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
