"""Plugin `adapters`: loads the sources `opaque` and `reference_backward`, and makes their kernels fit each layer."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from kernels_core import (
    Candidate,
    KernelLayer,
    Layer,
    LayerRequest,
    LoadedLayer,
    LoadError,
    hookimpl,
    plugin_manager,
    source_label,
)

if TYPE_CHECKING:
    from .source import Adapted

_kernels: weakref.WeakKeyDictionary[Any, KernelLayer] = weakref.WeakKeyDictionary()
"""The kernel inside of each class or function that was made here, for plugins that check it."""


@hookimpl(tryfirst=True)
def kernels_load_layer(request: LayerRequest, source: object) -> LoadedLayer | None:
    """Load the source inside, and return how its kernel is made to fit a layer."""
    from .source import Adapted

    if not isinstance(source, Adapted):
        return None
    inner = plugin_manager().hook.kernels_load_layer(request=request, source=source.source)
    if inner is None:
        raise LoadError(f"{source!r}: no plugin knows how to load a {type(source.source).__name__}")
    loaded = inner if isinstance(inner, LoadedLayer) else LoadedLayer(inner, source_label(inner))
    has_backward = bool(getattr(cast(Any, loaded.layer), "has_backward", True)) and not source.from_reference
    gradients = "gradients by the kernel" if has_backward else "gradients by the reference"
    check = {"reference_backward": gradients}
    if source.as_operator:
        check = {"opaque": f"one operator where traced, shaped by the reference, {gradients}"}
    adapt = functools.partial(_adapted, loaded, source, has_backward)
    # With the provenance of the kernel inside.
    return replace(loaded, layer=_declared(loaded.layer, source), checked={**loaded.checked, **check}, adapt=adapt)


@hookimpl
def kernels_authorize(request: LayerRequest, candidate: Candidate) -> str | None:
    """Ask about the source inside."""
    inner = _inner(candidate)
    if inner is None:
        return None
    return "; ".join(plugin_manager().hook.kernels_authorize(request=request, candidate=inner)) or None


@hookimpl
def kernels_check_layer(request: LayerRequest, candidate: Candidate, layer: KernelLayer) -> str | None:
    """Ask about the source inside, and the kernel inside."""
    inner = _inner(candidate)
    if inner is None:
        return None
    kernel = _kernels.get(layer, layer)
    return "; ".join(plugin_manager().hook.kernels_check_layer(request=request, candidate=inner, layer=kernel)) or None


def _inner(candidate: Candidate) -> Candidate | None:
    from .source import Adapted

    source = candidate.source
    return replace(candidate, source=source.source) if isinstance(source, Adapted) else None


def _declared(layer: KernelLayer, source: Adapted) -> KernelLayer:
    """Return a kernel with the declarations that it has once it is adapted, for requests that name no layer."""
    if isinstance(layer, type):
        return _subclass(layer, source, {})
    if not callable(layer):
        return layer

    def declared(*args: Any, **kwargs: Any) -> Any:
        return layer(*args, **kwargs)

    if isinstance(layer, types.FunctionType):
        functools.update_wrapper(declared, layer)
    declared.__dict__.update(_declarations(layer, source))
    _kernels[declared] = layer
    return declared


def _adapted(loaded: LoadedLayer, source: Adapted, has_backward: bool, layer: Layer) -> KernelLayer:
    """Make a kernel fit one layer; one that cannot serve any stays as it is, and the contract refuses it."""
    from .names import take_name
    from .operator import Operator, make_forward  # what makes operators is imported where one is made
    from .recompute import Recompute
    from .work import Work

    kernel: Any = loaded.adapt(layer) if loaded.adapt is not None else loaded.layer
    is_class = isinstance(kernel, type)
    module = torch.nn.Module
    fits = issubclass(kernel, module) and kernel.forward is not module.forward if is_class else layer.is_function
    if not fits:
        return cast(KernelLayer, kernel)
    forward, declared = kernel.forward if is_class else kernel, _declarations(kernel, source)
    if layer.is_function and is_class:
        forward = types.MethodType(forward, kernel())  # a function has no module: lend it an empty one
        if "supports" in declared:
            declared["supports"] = types.MethodType(declared["supports"], kernel())
    work = Work(layer, forward, loaded.origin, own_backward=has_backward)
    recompute = None if has_backward else Recompute(work)
    eager = forward if recompute is None else recompute.forward()
    traceable = bool(getattr(kernel, "can_torch_compile", False))
    made: Any = eager
    if source.as_operator or traceable:
        operator = Operator(work, take_name(layer, kernel, loaded.content, own_backward=has_backward))
        made = make_forward(operator, eager, forward if traceable and not source.as_operator else None)
        made.kernels_operator = operator
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(made, name, getattr(forward, name, None) or getattr(made, name))
    made.__signature__ = inspect.signature(forward)  # `*args` would break the contract
    if recompute is not None:
        recompute.implementation = made
    if is_class and not layer.is_function:
        return _subclass(kernel, source, {"forward": made})
    made.__dict__.update(declared)
    _kernels[made] = kernel
    return cast(KernelLayer, made)


def _declarations(layer: KernelLayer, source: Adapted) -> dict[str, Any]:
    traceable = source.as_operator or bool(getattr(cast(Any, layer), "can_torch_compile", False))
    kept = ("dtypes", "supports", "local_except")
    limits = {name: value for name in kept if (value := getattr(layer, name, None)) is not None}
    return {"can_torch_compile": traceable, "has_backward": True, **limits}


def _subclass(kernel: type[Any], source: Adapted, members: dict[str, Any]) -> type[Any]:
    """Return a class like a kernel's, so that the contract sees all that the kernel's has."""
    place = {name: getattr(kernel, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(kernel.__name__, (kernel,), {**place, **_declarations(kernel, source), **members})
    _kernels[made] = kernel
    return made
