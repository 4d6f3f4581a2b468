"""Plugin `inductor`: the layer's own forward, compiled by PyTorch, as a candidate for eager calls.

Licence: that of PyTorch, BSD. Tried with PyTorch 2.13 on CPUs. Served only where a mapping names `"pack:inductor"`:
compiling takes seconds, and on a CPU a C++ compiler. Limits: the whole forward has to compile as one graph; it is
compiled for as many kinds of calls as PyTorch allows for one function (8), and others run eager, as do those under
transforms of `torch.func`, and those of a module whose parts have hooks; no second derivatives, and one backward for
each forward.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kernels_core import KernelLayer, Layer, LoadedLayer, hookimpl, warn_once
from kernels_core.torch_internals import has_global_hooks, in_transform


def _kind(*values: Any) -> tuple[object, ...]:
    """Return what PyTorch compiles variants for, roughly: sizes from 2 on may be variable in one of them."""
    return tuple(
        (value.dtype, value.device, value.is_contiguous(), *(min(size, 2) for size in value.shape))
        if isinstance(value, torch.Tensor)
        else type(value)
        for value in values
    )


def _hooked(parts: Iterable[Any]) -> bool:
    """Whether one of these is a module with hooks, or has one in it: compiled code does not notice later ones."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or has_global_hooks()
        for m in modules
    ) or any(_hooked(m._modules.values()) for m in modules if m._modules)


def _compiled(layer: Layer) -> KernelLayer:
    reference = layer.reference
    eager: set[object] = set()
    """The kinds of calls for which there are too many variants already."""

    def inlined(*args: Any, **kwargs: Any) -> Any:
        return reference(*args, **kwargs)

    # PyTorch counts variants by code object: a copy gives each layer its own, also where classes share a forward.
    own = types.FunctionType(inlined.__code__.replace(), globals(), closure=inlined.__closure__)
    compiled = torch.compile(own, fullgraph=True)  # a graph that breaks raises with a reason

    @functools.wraps(reference)
    def forward(*args: Any, **kwargs: Any) -> Any:
        parts = args if layer.is_function else (*args[0]._modules.values(), *args[1:])
        if in_transform() or _hooked((*parts, *kwargs.values())):  # compiled code can be in no transform
            return reference(*args, **kwargs)
        # Each call that asks for one variant too many costs milliseconds, and is logged: one of a kind is enough.
        if not eager or (torch.is_grad_enabled(), *_kind(*args, *kwargs.values())) not in eager:
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                if not type(error).__name__.endswith("LimitHit"):  # its class is private, and has had two names
                    raise
                eager.add((torch.is_grad_enabled(), *_kind(*args, *kwargs.values())))
                few = "is compiled for as many kinds of calls as PyTorch allows for one function: others run eager"
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
