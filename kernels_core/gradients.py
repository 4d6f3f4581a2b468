"""Does autograd record a call, and does a kernel keep the gradients that the reference has?

A kernel that computes its output outside of autograd, without saying `has_backward = False`, trains
nothing and raises nothing. So the first recorded call of each layer and kernel is looked at: from each
argument and parameter that requires grad, a path must lead to the output, where the reference has one.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import KernelsWarning
from .layer import Layer
from .mode import Mode
from .quarantine import quarantine
from .request import Resolution

Forward = Callable[..., Any]

_kept: weakref.WeakKeyDictionary[Forward, set[int]] = weakref.WeakKeyDictionary()
"""Layers, by number, for which an implementation was seen to keep the gradients."""

_DYNAMO_SEES_ATTRIBUTES = torch.__version__ >= "2.13"
"""Whether Dynamo can go through the attributes of a module; 2.11 cannot."""

_MAX_NODES = 100_000
"""How far a graph is searched: one that is larger belongs to more than a layer."""


def records_autograd(module: torch.nn.Module | None, values: Iterable[Any]) -> bool:
    """Whether an argument, or a parameter, buffer or other tensor of the module, requires grad."""
    for value in values:
        for item in _items(value):
            if isinstance(item, torch.Tensor) and item.requires_grad:
                return True
    return module is not None and _has_trainable(module)


def _items(value: Any) -> Iterable[Any]:
    """What is looked at of an argument: itself, or what is one level inside."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)


def _has_trainable(module: torch.nn.Module) -> bool:
    """Whether a tensor of a module requires grad; asks the dictionaries, for `parameters()` takes microseconds.

    Some wrappers keep weights as plain attributes, so these count, but for versions of Dynamo that cannot look there.
    """
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.requires_grad:
                return True
    if _DYNAMO_SEES_ATTRIBUTES or not torch.compiler.is_dynamo_compiling():
        for tensor in module.__dict__.values():
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                return True
    return any(_has_trainable(child) for child in module._modules.values() if child is not None)


# --- What is known -------------------------------------------------------------------------------


def needs_proof(resolution: Resolution) -> bool:
    """Whether what serves recorded calls was not yet seen to keep their gradients."""
    layer, implementation = resolution.request.layer, resolution.implementation
    if layer is None or implementation is None:
        return False
    if not (resolution.every_mode or Mode.TRAINING in resolution.request.mode):
        return False
    return not keeps_gradients(layer, implementation)


def keeps_gradients(layer: Layer, implementation: Forward) -> bool:
    """Whether an implementation was seen to keep the gradients of a layer."""
    return layer.number in _kept.get(implementation, ())


# --- The first recorded call ---------------------------------------------------------------------


def try_gradients(
    layer: Layer,
    implementation: Forward,
    module: torch.nn.Module | None,
    values: Iterable[Any],
    call: Callable[[Forward], Any],
    *,
    kernel: str,
) -> tuple[Any, bool | None]:
    """Run a recorded call with an implementation, and look whether it keeps the gradients.

    Args:
        layer: What it serves.
        implementation: What is looked at.
        module: The module that is called, None for a function.
        values: The arguments of the call.
        call: Calls what it is given with the arguments of the call.
        kernel: Where the implementation came from.

    Returns:
        The output; and True where the gradients are kept, False where the kernel is refused from now
        on and the call can be made anew, None where it is refused but has changed what it was given,
        so that its output has to do.
    """
    sources = dict(_sources(layer, module, values))
    touched = [*sources.values(), *(module.buffers() if module is not None else ())]
    versions = [_version(tensor) for tensor in touched]
    output = call(implementation)
    missing = _unreached(sources, output)
    if missing:
        missing = [name for name in missing if name not in _missing_in_reference(layer, module, missing, sources, call)]
    if not missing:
        _kept.setdefault(implementation, set()).add(layer.number)
        return output, True
    reason = (
        f"it loses gradients: {', '.join(missing)} requires grad and gets none from it, as from the reference. "
        "Declare has_backward = False on the kernel, or give it a backward"
    )
    quarantine(layer, implementation, kernel=kernel, reason=reason, mode=Mode.TRAINING)
    if versions == [_version(tensor) for tensor in touched]:
        return output, False
    warnings.warn(
        f"Layer {layer.name!r}: {reason}. It changed its arguments in place, so this call cannot be made anew: "
        f"the gradients of this one call are lost.",
        KernelsWarning,
        stacklevel=2,
    )
    return output, None


def _sources(layer: Layer, module: torch.nn.Module | None, values: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what requires grad, with a name to tell it by."""
    names = list(layer.signature.parameters)
    for position, value in enumerate(values):
        name = f"argument {names[position]!r}" if position < len(names) else f"argument {position + 1}"
        for item in _items(value):
            if isinstance(item, torch.Tensor) and item.requires_grad:
                yield name, item
    if module is not None:
        yield from ((f"parameter {name!r}", p) for name, p in module.named_parameters() if p.requires_grad)


def _missing_in_reference(
    layer: Layer,
    module: torch.nn.Module | None,
    missing: list[str],
    sources: dict[str, torch.Tensor],
    call: Callable[[Forward], Any],
) -> list[str]:
    """Which gradients the reference does not have either; leaves random numbers and buffers as they were."""
    buffers = [(b, b.clone(), _version(b)) for b in module.buffers()] if module is not None else []
    devices = {tensor.device.index for tensor in sources.values() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
            expected = call(layer.reference)
    except Exception as error:  # the kernel serves where the reference cannot: nothing to compare with
        warnings.warn(
            f"Layer {layer.name!r}: {', '.join(missing)} gets no gradient from its kernel, and whether that is "
            f"right is not known, for the reference fails: {type(error).__name__}: {error}",
            KernelsWarning,
            stacklevel=3,
        )
        return missing
    finally:
        with torch.no_grad():
            for buffer, before, version in buffers:
                if version != _version(buffer) or version < 0:  # autograd may have saved one that did not change
                    buffer.copy_(before)
    return _unreached({name: sources[name] for name in missing}, expected)


def _unreached(sources: dict[str, torch.Tensor], output: Any) -> list[str]:
    """Return the names of the sources from which no path leads to the output."""
    outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if not outputs:  # hidden in an object that nobody can look into
        return []
    leaves: dict[int, set[str]] = {}  # a tensor may be given twice
    edges: dict[Any, set[str]] = {}
    for name, tensor in sources.items():
        leaves.setdefault(id(tensor), set()).add(name)
        if tensor.grad_fn is not None:
            edges.setdefault((tensor.grad_fn, tensor.output_nr), set()).add(name)
    waiting = set(sources)
    waiting -= {name for tensor in outputs for name in leaves.get(id(tensor), ())}
    stack: list[tuple[Any, int]] = [
        (tensor.grad_fn, tensor.output_nr) for tensor in outputs if tensor.grad_fn is not None
    ]
    seen: set[Any] = set()
    while stack and waiting and len(seen) < _MAX_NODES:
        node, number = stack.pop()
        if (node, number) in edges:
            waiting -= edges[node, number]
            continue
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None:
            waiting -= leaves.get(id(variable), set())
        if node not in seen:
            seen.add(node)
            stack += [edge for edge in node.next_functions if edge[0] is not None]
    return [name for name in sources if name in waiting] if len(seen) < _MAX_NODES else []


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count that."""
    with contextlib.suppress(RuntimeError):
        return tensor._version
    return -1
