"""The contract: whether a kernel may serve a layer, and calls of a mode, with the reason where it may not."""

from __future__ import annotations

import inspect
from typing import Any, Generic, cast

import torch

from .layer import Layer, call_signature
from .mode import Mode
from .resolution import KernelLayer, LayerRequest, attribute

_DECLARATIONS = {"can_torch_compile", "has_backward"}
BOUND = "_kernels_bound"
"""The attribute in which a kernel class keeps the method that serves a function layer."""

_BENIGN = {
    BOUND,
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__classcell__",
    "__conditional_annotations__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__slots__",
    "__static_attributes__",
    "__weakref__",
    "forward",
}
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY,)


def check_mode(request: LayerRequest, layer: KernelLayer) -> str | None:
    """Return why a kernel layer does not serve calls of this mode, or None."""
    # The mode of the request is read last: reading it limits the decision to one mode.
    if not attribute(layer, "has_backward", True) and Mode.TRAINING in request.mode:
        return "it declares has_backward = False, and autograd records this call"
    if request.is_traced and not attribute(layer, "can_torch_compile", False):
        return "it does not declare can_torch_compile = True, and this call is being traced"
    return None


def check_contract(layer: Layer | None, kernel: KernelLayer) -> str | None:
    """Return why `kernel` may not serve `layer`, or None.

    A kernel layer borrows the module that it serves: its `forward` runs with `self` being an
    instance of the decorated class. So it can have no state and no methods of its own, and must
    take the same number and kinds of arguments. With `layer` None, only the kernel itself is checked.
    """
    if isinstance(kernel, type):
        reason = _check_class(kernel)
    elif isinstance(kernel, torch.nn.Module):
        reason = f"it is a module, where its class is wanted: {type(kernel).__qualname__}"
    elif callable(kernel):
        reason = None
        if layer is not None and not layer.is_function:
            reason = "it is a function, and this layer is a class: a class needs an nn.Module subclass"
    else:
        reason = f"it is neither an nn.Module subclass nor a function, but {type(kernel).__name__}"
    if reason is not None or layer is None:
        return reason
    forward: Any = cast(Any, kernel).forward if isinstance(kernel, type) else kernel
    try:
        ours = layer.signature
        theirs = call_signature(forward, drop_self=isinstance(kernel, type))
    except (TypeError, ValueError) as error:
        return f"signatures cannot be compared: {error}"
    return _check_signature(ours, theirs, as_called=_passes_on(layer))


def _check_class(kernel: type[Any]) -> str | None:
    if not issubclass(kernel, torch.nn.Module):
        return f"{kernel.__qualname__} is not a subclass of torch.nn.Module"
    if kernel.__init__ is not torch.nn.Module.__init__:
        return f"{kernel.__qualname__} has a constructor of its own, which would never run"
    if kernel.forward is torch.nn.Module.forward:
        return f"{kernel.__qualname__} has no forward"
    own = [base for base in kernel.__mro__ if base not in torch.nn.Module.__mro__ and base is not Generic]
    extra = sorted({name for base in own for name in vars(base)} - _DECLARATIONS - _BENIGN)
    if extra:
        return (
            f"{kernel.__qualname__} has members besides forward that the layer it serves does not have: "
            f"{', '.join(extra)}"
        )
    return None


def _passes_on(layer: Layer) -> bool:
    """Return whether the reference shows another signature than it has, as a decorator with *args does."""
    return inspect.signature(layer.reference) != inspect.signature(layer.reference, follow_wrapped=False)


def _check_signature(ours: inspect.Signature, theirs: inspect.Signature, *, as_called: bool = False) -> str | None:
    if _shape(ours) == _shape(theirs) and not (as_called and _names(ours) != _names(theirs)):
        return _check_order(ours, theirs)
    return (
        "its forward takes other parameters than this layer's\n"
        f"    layer:  {_bare(ours)}\n    kernel: {_bare(theirs)}\n"
        "  number and kinds must be equal (names, too, where arguments are passed by keyword only)"
    )


def _check_order(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Refuse equal names in another order: arguments are passed by position, and would be swapped in silence."""
    mine, other = dict(_names(ours)), dict(_names(theirs))
    if list(mine) != list(other) and mine.keys() == other.keys() and _positional(ours) != _positional(theirs):
        return (
            "its forward takes the parameters of this layer's in another order\n"
            f"    layer:  {_bare(ours)}\n    kernel: {_bare(theirs)}"
        )
    return None


def _positional(signature: inspect.Signature) -> list[str]:
    return [p.name for p in signature.parameters.values() if p.kind not in (*_VARIABLE, *_BY_NAME)]


def _shape(signature: inspect.Signature) -> list[tuple[int, str]]:
    """Return the kind of each parameter, and its name where calls use it: these must be equal."""
    return sorted((p.kind, p.name if p.kind in _BY_NAME else "") for p in signature.parameters.values())


def _names(signature: inspect.Signature) -> list[tuple[str, bool]]:
    """Return names and defaults, which must be equal, too, where the kernel gets arguments as the caller wrote them."""
    return [(p.name, p.default is p.empty) for p in signature.parameters.values() if p.kind not in _VARIABLE]


def _bare(signature: inspect.Signature) -> str:
    """Print a signature without annotations, so that two of them align."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
