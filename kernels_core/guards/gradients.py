"""Does autograd record a call, and does a kernel keep the gradients that the reference has?

A kernel that computes its output outside of autograd, without declaring `has_backward = False`, trains nothing and
raises nothing. So the recorded calls of each layer and kernel are checked, until each argument and parameter has
required grad once, or no other one has for many calls: a path must lead from each that does to the output, where the
reference has one.
"""

from __future__ import annotations

import collections
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..environment import strict
from ..forward_source import PLAIN
from ..layer import Forward, Layer
from ..mode import Mode
from ..nested import MOST, SEQUENCES, held_by
from ..raised import error_text
from ..replay import Call, generators_of, leaves, nodes, random_states, set_random_states
from ..resolution import Resolution
from ..torch_internals import (
    DYNAMO_LISTS_ATTRIBUTES,
    constant_result,
    in_forward_ad,
    in_transform,
    version,
)
from ..warning import warn, warn_once
from .functions import in_function
from .quarantine import Quarantined, is_agreed, quarantine
from .saved_tensors import held_back

_CALLS_WITHOUT_NEWS = 100
"""Recorded calls without a new source, after which the rest is taken for constant: masks, angles, frozen weights."""


@dataclass
class _Kept:
    """The gradients that a kernel keeps, and those that it loses.

    Attributes:
        kept: The arguments and parameters whose gradients it keeps.
        calls: How many calls ago the last one was added.
        lost: Those whose gradients it loses.
        entry: Its quarantine, where ranks are to leave it together.
    """

    kept: set[str] = field(default_factory=set)
    calls: int = 0
    lost: set[str] = field(default_factory=set)
    entry: Quarantined | None = None


_records: weakref.WeakKeyDictionary[Forward, dict[int, _Kept]] = weakref.WeakKeyDictionary()
"""The checks of an implementation, per number of a layer."""

_proven: weakref.WeakKeyDictionary[Forward, set[int]] = weakref.WeakKeyDictionary()
"""Layers, by number, for which an implementation keeps the gradients of everything that requires them."""

_MAX_NODES = 100_000
"""How far a graph is searched: one that is larger belongs to more than a layer."""

_HOLD_NO_TENSOR = PLAIN | {set, type, collections.OrderedDict}
"""Types of attributes that are not searched for tensors; a module has about 15 of them."""


def is_recorded(module: torch.nn.Module | None, values: Iterable[Any]) -> bool:
    """Whether autograd records a call, or may record it later (`in_function`), or differentiates it forwards.

    Inside of `torch.func.vmap`, no tensor shows that autograd, or a transform around it, records it.
    """
    if torch.is_grad_enabled() and (records_autograd(module, values) or in_transform()):
        return True
    return in_forward_ad() or in_function()


@constant_result
def is_transformed() -> bool:
    """Whether `torch.func` transforms a call that Dynamo traces: Dynamo enters transforms, and runs this then."""
    return in_transform()


def records_autograd(module: torch.nn.Module | None, values: Iterable[Any]) -> bool:
    """Whether an argument, or a parameter, buffer or other tensor of the module, requires grad."""
    traced = torch.compiler.is_dynamo_compiling()
    tensors, modules, complete = held_by(values, attributes=not traced)
    for tensor in tensors:
        if tensor.requires_grad:
            return True
    for each in modules if module is None else (*modules, module):
        if has_trainable(each):
            return True
    # Dynamo looks at attributes last: it guards on all that it looks at.
    return not complete or (traced and requires_grad(values))


def requires_grad(value: Any) -> bool:
    """Whether an argument is a tensor or module that requires grad, or holds one, or more than can be looked at."""
    tensors, modules, complete = held_by((value,))
    for tensor in tensors:
        if tensor.requires_grad:
            return True
    for module in modules:
        if has_trainable(module):
            return True
    return not complete


def has_trainable(module: torch.nn.Module) -> bool:
    """Whether a tensor of a module requires grad; asks the dictionaries, for `parameters()` takes microseconds.

    Some wrappers keep weights as plain attributes, so these are searched, except by versions of Dynamo that cannot.
    """
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.requires_grad:
                return True
    if not torch.compiler.is_dynamo_compiling():
        if _has_trainable_attribute(module):
            return True
    elif DYNAMO_LISTS_ATTRIBUTES:
        for tensor in module.__dict__.values():
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                return True
    children = module._modules
    return bool(children) and any(child is not None and has_trainable(child) for child in children.values())


def reads_trainable(names: Iterable[str], module: torch.nn.Module) -> bool:
    """Do the same for some attributes of a module; where one is neither a plain value nor a parameter, for all."""
    parameters = module._parameters
    if not parameters:
        return has_trainable(module)
    attributes = module.__dict__  # to register a parameter has made it
    for name in names:
        value = attributes[name] if name in attributes else parameters.get(name, module)
        if type(value) in PLAIN:
            continue
        if not isinstance(value, torch.Tensor):
            return has_trainable(module)
        if value.requires_grad:
            return True
    return False


def _has_trainable_attribute(module: torch.nn.Module) -> bool:
    """Whether a plain attribute of a module, or one in a list, tuple or dict there, is a tensor that requires grad.

    Asks the garbage collector for the referents of the module. From Python 3.11 on, to ask for `__dict__` would make
    one, and reading an attribute of the module would be slower ever after.
    """
    return _holds_trainable(gc.get_referents(module), 10)  # a list may hold itself


def _holds_trainable(values: Iterable[Any], depth: int) -> bool:
    for value in values:
        kind = type(value)
        if kind in _HOLD_NO_TENSOR:  # `isinstance` takes four times as long
            continue
        if kind is dict or kind in SEQUENCES:
            if depth and _holds_trainable(value.values() if kind is dict else value, depth - 1):
                return True
        elif isinstance(value, torch.Tensor) and value.requires_grad:
            return True
    return False


# --- Results -------------------------------------------------------------------------------------


def needs_proof(resolution: Resolution) -> bool:
    """Whether the kernel that serves recorded calls is not yet proven to keep their gradients."""
    layer, implementation = resolution.request.layer, resolution.implementation
    if layer is None or implementation is None:
        return False
    if not (resolution.every_mode or Mode.TRAINING in resolution.request.mode):
        return False
    return not keeps_gradients(layer, implementation)


def keeps_gradients(layer: Layer, implementation: Forward) -> bool:
    """Whether an implementation is proven to keep every gradient of a layer; one of coroutines cannot be run again."""
    return bool(layer.kind) or layer.number in _proven.get(implementation, ())


# --- Checking a recorded call --------------------------------------------------------------------


def try_gradients(
    layer: Layer,
    implementation: Forward,
    module: torch.nn.Module | None,
    values: Iterable[Any],
    call: Callable[[Forward], Any],
    *,
    kernel: str,
) -> tuple[Any, bool | None]:
    """Run a call with an implementation, and check the gradients that it is not yet proven to keep.

    Args:
        layer: The layer that it serves.
        implementation: The function to check.
        module: The module that is called, None for a function.
        values: The arguments of the call.
        call: Calls a function with the arguments of the call.
        kernel: Where the implementation came from.

    Returns:
        The output; and True where the gradients are kept, False where the kernel is refused from now
        on and the call can be made anew, None where the output must be used: that of the reference where ranks leave
        the kernel later, together; or that of a kernel that is refused and has changed its arguments.
    """
    touched, _, complete = held_by(values)
    if not complete and layer.use_fallback and not strict():
        warn_once(
            f"Layer {layer.name!r}: more than {MOST} values are in the arguments of a call, so whether {kernel} loses "
            "a gradient cannot be checked: the reference serves such calls. Pass fewer, or run it under no_grad.",
            (layer.name, kernel, MOST),
        )
        return call(layer.reference), None
    candidates = dict(_candidates(layer, module, values))
    sources = {name: tensor for name, tensor in candidates.items() if tensor is not None and tensor.requires_grad}
    # Not by layer: a kernel must not keep layers alive.
    record = _records.setdefault(implementation, {}).setdefault(layer.number, _Kept())
    if record.kept.issuperset(sources):
        record.calls += 1
        if record.calls >= _CALLS_WITHOUT_NEWS:
            _proven.setdefault(implementation, set()).add(layer.number)
        return call(implementation), True
    if record.entry is not None and record.entry.is_waiting and record.lost.intersection(sources):
        return call(layer.reference), None
    touched += [*module.parameters(), *module.buffers()] if module is not None else []
    versions = [version(tensor) for tensor in touched]
    generators = generators_of([*values, module])
    drawn = random_states([*(tensor.device for tensor in touched), *generators])  # for a call that has to be made anew
    with held_back() as saved:
        output = call(implementation)
    if output is NotImplemented:  # another kernel serves this call, and this one has proven nothing
        saved.hand_over()
        return output, True
    # -1: inference tensors count no changes, so none can be excluded.
    untouched = -1 not in versions and versions == [version(tensor) for tensor in touched]
    # An iterator is used up: the call cannot be made anew.
    untouched = untouched and not any(isinstance(node, Iterator) for _, node, _ in nodes(values))
    missing = unreached(sources, output)
    if missing:
        without = _missing_in_reference(layer, module, missing, sources, call)
        missing = [name for name in missing if name not in without]
    if not missing:
        saved.hand_over()
        record.kept.update(sources)
        record.calls = 0
        if record.kept.issuperset(candidates):  # also those that do not require grad in this call
            _proven.setdefault(implementation, set()).add(layer.number)
        return output, True
    reason = (
        f"it loses gradients: {', '.join(missing)} requires grad and gets none from it, as from the reference. "
        "Declare has_backward = False on the kernel, or give it a backward"
    )
    # One that keeps other gradients is no kernel without a backward: it does not use what a child of the module does.
    ignores = any(name.startswith("parameter") and "." in name for name in missing) and len(missing) < len(sources)
    mode = None if ignores else Mode.TRAINING
    # Ranks that have agreed on it leave it together, if each such call can be answered by the reference until then.
    waits = untouched and layer.use_fallback and not strict() and is_agreed(layer)
    entry = quarantine(layer, implementation, kernel=kernel, reason=reason, mode=mode, now=not waits)
    if waits:
        record.entry, record.lost = entry, record.lost.union(missing)
        compiled = Mode.TORCH_COMPILE if mode is None else mode | Mode.TORCH_COMPILE
        quarantine(layer, implementation, kernel=kernel, reason=reason, mode=compiled, now=True)  # is not checked
    if untouched:
        set_random_states(drawn)  # or the call that is made anew would draw the next numbers
        return (call(layer.reference), None) if waits else (output, False)
    saved.hand_over()
    warn(
        f"Layer {layer.name!r}: {reason}. It may have changed its arguments or buffers in place, so this call cannot "
        "be made anew: the gradients of this one call are lost.",
    )
    return output, None


def _candidates(
    layer: Layer, module: torch.nn.Module | None, values: Iterable[Any]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each tensor that requires grad, or may on another call, by name; None for an argument that is not given."""
    names = list(layer.signature.parameters)
    tensors, modules, _ = held_by(values)
    unnamed = {id(tensor): tensor for tensor in tensors if _may_require_grad(tensor)}
    for position, value in enumerate(values):
        name = f"argument {names[position]!r}" if position < len(names) else f"argument {position + 1}"
        for path, leaf in leaves(value, name):
            if _may_require_grad(leaf):
                unnamed.pop(id(leaf), None)
                yield path, leaf
    yield from ((f"tensor {number} in the arguments", tensor) for number, tensor in enumerate(unnamed.values(), 1))
    for number, each in enumerate(modules, 1):
        yield from _candidates_of(each, f"{type(each).__name__} {number} in the arguments.")
    if module is not None:
        yield from _candidates_of(module, "")


def _candidates_of(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor | None]]:
    attributes = dict(_attributes(module)) if _has_trainable_attribute(module) else {}
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", attributes)):
        for name, tensor in tensors.items():
            if kind == "parameter" or (isinstance(tensor, torch.Tensor) and tensor.requires_grad):
                yield f"{kind} {prefix + name!r}", tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _candidates_of(child, f"{prefix}{name}.")


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the plain attributes of a module, and the items of lists, tuples and dictionaries among them."""
    for name, held in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from leaves(held, name) if type(held) in (dict, list, tuple) else ((name, held),)


def _may_require_grad(value: Any) -> bool:
    return value is None or (isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()))


def _missing_in_reference(
    layer: Layer,
    module: torch.nn.Module | None,
    missing: list[str],
    sources: dict[str, torch.Tensor],
    call: Callable[[Forward], Any],
) -> list[str]:
    """Return the names of the gradients that the reference lacks, too; it runs on copies."""
    args, kwargs = call(lambda *args, **kwargs: (args, kwargs))
    if module is not None:
        args = args[1:]
    try:
        with Call(module, args, kwargs, layer.signature).replayed(
            layer.reference, parameters=False, changes=False
        ) as replay:
            lost = unreached(replay.sources, replay.outputs)
            shared = unreached(sources, replay.outputs)  # of what is not copied, such as modules in the arguments
    except Exception as error:  # the kernel serves where the reference cannot: nothing to compare with
        warn(
            f"Layer {layer.name!r}: {', '.join(missing)} gets no gradient from its kernel, and whether that is "
            f"right is not known, for the reference fails: {error_text(error)}",
        )
        return missing
    # By object: a replay has other names for the same tensors.
    reached = {id(original) for name, original in replay.originals.items() if name not in lost}
    return [name for name in missing if id(sources[name]) not in reached and name in shared]


def unreached(sources: dict[str, torch.Tensor], output: Any) -> list[str]:
    """Return the names of the sources from which no path leads to the output."""
    outputs, _, _ = held_by([output])
    if not outputs:  # hidden in an object of an unknown class
        return []
    leaves: dict[int, set[str]] = {}  # a tensor may be given twice
    edges: dict[Any, set[str]] = {}
    for name, tensor in sources.items():
        leaves.setdefault(id(tensor), set()).add(name)
        if tensor.grad_fn is not None:
            # No leaf: the path ends at the operator that made it.
            edges.setdefault((tensor.grad_fn, tensor.output_nr), set()).add(name)
    waiting = set(sources)
    waiting -= {name for tensor in outputs for name in leaves.get(id(tensor), ())}
    stack: list[tuple[Any, int]] = [
        (tensor.grad_fn, tensor.output_nr) for tensor in outputs if tensor.grad_fn is not None
    ]
    visited: set[Any] = set()
    while stack and waiting and len(visited) < _MAX_NODES:
        node, number = stack.pop()
        if (node, number) in edges:
            waiting -= edges[node, number]
            continue
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None:
            waiting -= leaves.get(id(variable), set())
        if node not in visited:
            visited.add(node)
            stack += [edge for edge in node.next_functions if edge[0] is not None]
    # Not known: no kernel is accused.
    return [name for name in sources if name in waiting] if len(visited) < _MAX_NODES else []
