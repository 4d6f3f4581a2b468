"""The contract: whether a kernel may serve a layer, and calls of a mode, with the reason where it may not."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any, Generic, cast

import torch

from .forward_source import own_signature
from .guards.limits import DECLARATIONS as LIMITS
from .guards.limits import check_limits
from .guards.numerics import NUMERICS, check_declared
from .guards.shards import check_local
from .guards.tensors import DECLARATION, LOCAL, check_tensors
from .layer import Layer, call_signature, function_kind
from .mode import Mode
from .raised import message_of
from .resolution import KernelLayer, LayerRequest, Resolution

NOT_TRACED = "it does not declare can_torch_compile = True, and this call is being traced"
_DECLARATIONS = {"can_torch_compile", "has_backward", "reads", DECLARATION, LOCAL, *LIMITS, *NUMERICS}
BOUND = "_kernels_bound"
"""The attribute in which a kernel class keeps the method that serves a function layer."""

_FROM_PYTHON = (
    "annotate annotate_func annotations annotations_cache classcell conditional_annotations dict doc firstlineno "
    "module orig_bases parameters qualname slots static_attributes weakref"
)
"""Members that a `class` statement makes, in some version of Python, between double underscores."""

_BENIGN = {BOUND, "forward", *_DECLARATIONS, *(f"__{name}__" for name in _FROM_PYTHON.split())}
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NOT_BY_POSITION = (*_VARIABLE, inspect.Parameter.KEYWORD_ONLY)


def check_mode(request: LayerRequest, layer: KernelLayer) -> str | None:
    """Return why a kernel layer does not serve calls of this mode, or None."""
    # The mode of the request is read last: reading it limits the decision to one mode.
    if not getattr(layer, "has_backward", True) and Mode.TRAINING in request.mode:
        return "it declares has_backward = False, and autograd records this call"
    if request.is_traced and not getattr(layer, "can_torch_compile", False):
        return NOT_TRACED
    return None


def check_call(choice: Resolution, subclasses: Iterable[type[torch.Tensor]], *, traced: bool) -> str | None:
    """Return why the kernel of an earlier decision does not serve such a call, or None."""
    if choice.is_reference:
        return None
    return NOT_TRACED if traced and not choice.can_be_traced else check_tensors(subclasses, choice.kernel_layer)


def check_contract(layer: Layer | None, kernel: KernelLayer) -> str | None:
    """Return why `kernel` may not serve `layer`, or None.

    The `forward` of a kernel class runs with `self` being an instance of the decorated class. So it can have no
    state and no methods of its own, and must take the same number and kinds of arguments. With `layer` None,
    only the kernel itself is checked.
    """
    if isinstance(kernel, type):
        if (reason := _check_class(kernel)) is not None:
            return reason
    elif isinstance(kernel, torch.nn.Module):  # its state would be used, and that of the layer not
        return f"it is a module, where its class is wanted: {type(kernel).__qualname__}"
    elif not callable(kernel):
        return f"it is neither an nn.Module subclass nor a function, but {type(kernel).__name__}"
    elif layer is not None and not layer.is_function:
        return "it is a function, and this layer is a class: a class needs an nn.Module subclass"
    elif (reason := _check_object(kernel)) is not None:
        return reason
    declared = getattr(kernel, DECLARATION, ())
    if declared != () and not (isinstance(declared, tuple) and all(isinstance(each, type) for each in declared)):
        return f"its {DECLARATION} must be a tuple of classes, not {declared!r}"
    wrong = check_declared(kernel) or check_limits(layer, kernel)
    if wrong is None and getattr(kernel, LOCAL, None) is not None:
        wrong = check_local(layer, kernel)
    if wrong is not None or layer is None:
        return wrong
    forward: Any = cast(Any, kernel).forward if isinstance(kernel, type) else kernel
    if (kind := function_kind(forward)) != layer.kind:
        return f"it is a {kind or 'plain'} function, where the layer's own forward is a {layer.kind or 'plain'} one"
    try:
        ours = layer.signature
        theirs = call_signature(forward, drop_self=isinstance(kernel, type))
    except (TypeError, ValueError) as error:
        return f"signatures cannot be compared: {message_of(error)}"
    # A decorator with *args shows the signature that it wraps, and passes arguments on as they were written.
    passes_on = inspect.signature(layer.reference) != (taken := own_signature(layer.reference))
    own = [p.name for p in taken.parameters.values() if p.default is not p.empty and p.name not in ours.parameters]
    if passes_on and own:
        return f"it would replace a decorator of the layer's forward that has parameters of its own: {', '.join(own)}"
    return _check_signature(ours, theirs, as_called=passes_on)


def _check_object(kernel: object) -> str | None:
    """Return why nothing can be remembered of a callable object, such as its proof or that it is in quarantine."""
    try:
        hash(weakref.ref(kernel))
    except TypeError as error:
        why = message_of(error)
        return f"it is an object that must allow a hash and weak references, and does not ({why}): offer a function"
    return None


def _check_class(kernel: type[Any]) -> str | None:
    if not issubclass(kernel, torch.nn.Module):
        return f"{kernel.__qualname__} is not a subclass of torch.nn.Module"
    if kernel.__init__ is not torch.nn.Module.__init__:  # its forward runs on modules that the decorated class has made
        return f"{kernel.__qualname__} has a constructor of its own, which would never run"
    if kernel.forward is torch.nn.Module.forward:  # a placeholder that raises
        return f"{kernel.__qualname__} has no forward"
    if (reads := getattr(kernel, "reads", None)) is not None and not _is_reads(reads):
        return (
            f"{kernel.__qualname__} declares reads = {reads!r}, which must map the path of each part that it reads "
            'past to its class, or a tuple of classes: {"gate_proj": nn.Linear}'
        )
    # `Generic` adds members, and no state: a kernel class may have type parameters.
    own = [base for base in kernel.__mro__ if base not in torch.nn.Module.__mro__ and base is not Generic]
    extra = sorted({name for base in own for name in vars(base)} - _BENIGN)
    if extra:
        return (
            f"{kernel.__qualname__} has members besides forward that the layer it serves does not have: "
            f"{', '.join(extra)}"
        )
    return None


def _is_reads(reads: object) -> bool:
    if not isinstance(reads, dict) or not all(isinstance(path, str) for path in reads):
        return False
    kinds = (each for kind in reads.values() for each in (kind if isinstance(kind, tuple) else (kind,)))
    return all(isinstance(kind, type) for kind in kinds)


def _check_signature(ours: inspect.Signature, theirs: inspect.Signature, *, as_called: bool) -> str | None:
    """Compare signatures; `as_called`: the kernel gets arguments by position and by name as the caller wrote them."""
    if _names_and_kinds(ours) == _names_and_kinds(theirs):  # as of nearly all: this is part of a first call
        return None
    mine, other = ([p.name for p in s.parameters.values() if p.kind not in _NOT_BY_POSITION] for s in (ours, theirs))
    hint = ""
    if _shape(ours) != _shape(theirs) or (as_called and _names(ours) != _names(theirs)):
        problem = "other parameters than this layer's"
        hint = "\n  number and kinds must be equal (names, too, where arguments are passed by keyword only)"
    elif mine != other and sorted(mine) == sorted(other):  # passed by position, they would be swapped in silence
        problem = "the parameters of this layer's in another order"
    else:
        return None
    return f"its forward takes {problem}\n    layer:  {_bare(ours)}\n    kernel: {_bare(theirs)}{hint}"


def _names_and_kinds(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    """Return name and kind of each parameter, and whether it has a default."""
    return [(p.name, p.kind, p.default is p.empty) for p in signature.parameters.values()]


def _shape(signature: inspect.Signature) -> list[tuple[int, str]]:
    """Return the kind of each parameter, and its name where calls use it: these must be equal."""
    by_name = inspect.Parameter.KEYWORD_ONLY
    return sorted((p.kind, p.name if p.kind is by_name else "") for p in signature.parameters.values())


def _names(signature: inspect.Signature) -> list[tuple[str, bool]]:
    """Return names and whether they have a default, of all parameters but `*args` and `**kwargs`."""
    return [(p.name, p.default is p.empty) for p in signature.parameters.values() if p.kind not in _VARIABLE]


def _bare(signature: inspect.Signature) -> str:
    """Print a signature without annotations, so that two of them align."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
