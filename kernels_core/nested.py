"""Nested values: the tensors in them, everything in them by path, and the same value with other leaves."""

from __future__ import annotations

import copy
import dataclasses
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch

from .forward_source import PLAIN
from .torch_internals import DYNAMO_LISTS_ATTRIBUTES, registered_node, storage_key

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, torch.Size, torch.dtype, torch.device, type(None), type)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
SEQUENCES = frozenset({tuple, list})
_ITEMS: dict[type[Any], Callable[[Any], Iterable[Any]]] = {
    dict: dict.values,
    types.MappingProxyType: cast(Any, types.MappingProxyType).values,
    **{kind: cast(Any, kind).__iter__ for kind in (list, tuple, set, frozenset, deque)},
}
MAPPINGS = (dict, types.MappingProxyType)
CONTAINERS = tuple(_ITEMS)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_CLOSED = PLAIN.union({type, torch.dtype, torch.device}, _FUNCTIONS)
SIMPLE = _CLOSED | _TENSORS
"""Classes of values that neither hold a tensor nor are one that is not plain."""
_NAMESPACE = types.SimpleNamespace
_OF_PYTHON = 1 << 9
"""The flag of classes that a `class` statement has made: generators and arrays are of others."""
_DEEPEST = 100
"""How deep paths lead."""

MOST = 10_000
"""How many values are looked at in the arguments of a call: an object may lead to all of a program.

Numbers and texts do not count: a list may have many of them.
"""
_FEW = 100

Remake = Callable[[list[Any]], Any]
Held = tuple[list[torch.Tensor], list[torch.nn.Module], bool]


# --- The tensors of a call -------------------------------------------------------------------------------


def held_by(values: Iterable[Any], *, attributes: bool = True) -> Held:
    """Return the tensors and modules among values and in them, to any depth; and whether all were looked at.

    Goes through lists, tuples, dicts and sets first, level by level, then through the attributes of other objects, such
    as dataclasses and caches: not of functions, classes and modules, nor of objects of PyTorch (but distributions).
    Warm calls run this for arguments that are containers.

    Args:
        values: The values, such as the arguments of a call.
        attributes: Whether the attributes of all objects are looked at, or of dataclasses only: of none where Dynamo
            traces.
    """
    if torch.compiler.is_dynamo_compiling():
        return _held_traced(values, attributes)
    tensors: list[torch.Tensor] = []
    modules: list[torch.nn.Module] = []
    objects: list[Any] = []
    others: set[type[Any]] = set()
    opened: set[int] = set()
    left = MOST
    while left > 0:
        inside: list[Any] = []
        for value in values:
            kind = type(value)
            if kind in _CLOSED:
                continue
            if kind in _TENSORS:
                tensors.append(value)
            elif kind in SEQUENCES:
                inside += value
            elif kind in others:
                objects.append(value)
            elif issubclass(kind, torch.Tensor):
                tensors.append(value)
            elif kind is dict:
                inside += value.values()
            elif issubclass(kind, CONTAINERS):
                inside += items_of(value)
                if attributes and kind not in _ITEMS:
                    objects.append(value)
            elif issubclass(kind, torch.nn.Module):
                modules.append(value)
            elif attributes or hasattr(kind, "__dataclass_fields__"):
                others.add(kind)
                objects.append(value)
        if not inside:
            if not objects:
                return tensors, modules, True
            inside, objects = _attributes(objects, opened), []
        if len(inside) > _FEW:
            inside = [value for value in inside if type(value) not in _CLOSED]
        left -= len(inside) or 1
        values = inside
    return tensors, modules, False


def _held_traced(values: Iterable[Any], attributes: bool) -> Held:
    """Do the same where Dynamo traces: it knows no garbage collector, and in PyTorch 2.6 no sets of classes."""
    tensors: list[torch.Tensor] = []
    modules: list[torch.nn.Module] = []
    objects: list[Any] = []
    left = MOST
    while left > 0:
        inside: list[Any] = []
        for value in values:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            elif isinstance(value, MAPPINGS):
                inside.extend(value.values())
            elif isinstance(value, CONTAINERS):
                inside.extend(value)
            elif isinstance(value, torch.nn.Module):
                modules.append(value)
            elif attributes and not isinstance(value, (*_PLAIN, *_FUNCTIONS)) and _opens(type(value)):
                objects.append(value)
        if not inside:
            if not objects or not DYNAMO_LISTS_ATTRIBUTES:
                return tensors, modules, not objects
            for value in objects:
                if hasattr(value, "__dict__"):
                    inside.extend(value.__dict__.values())
            objects = []
        left -= len(inside) or 1
        values = inside
    return tensors, modules, False


def items_of(container: Any) -> Iterable[Any]:
    """Return the items of a container, of a mapping its values: by no `__iter__` of its class: it may do more."""
    return _ITEMS[next(base for base in type(container).__mro__ if base in _ITEMS)](container)


def first_tensor(values: Iterable[Any], *, attributes: bool = True) -> torch.Tensor | None:
    """Return the first tensor among values and in them, those in attributes of objects last; None without one."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, CONTAINERS):
            tensors, _, _ = held_by((value,), attributes=False)
            if tensors:
                return tensors[0]
    tensors, _, _ = held_by(values) if attributes else ([], [], True)
    return tensors[0] if tensors else None


def _attributes(objects: list[Any], opened: set[int]) -> list[Any]:
    """Return the values that objects hold, those that were opened before left out.

    Asks the garbage collector, as it finds slots, too, and runs no code of the objects.
    """
    opens = {
        kind: _opens(kind) for kind in set(map(type, objects)) if kind.__flags__ & _OF_PYTHON or kind is _NAMESPACE
    }
    fresh = [value for value in objects if opens.get(type(value)) and id(value) not in opened]
    opened.update(map(id, fresh))
    classes = set(map(type, opens))  # an object refers to its class, too
    return [value for value in gc.get_referents(*fresh) if type(value) not in classes]


def _opens(kind: type[Any]) -> bool:
    if kind.__module__.startswith("torch."):
        return kind.__module__.startswith("torch.distributions.")
    return not issubclass(kind, type)


# --- Everything by path ----------------------------------------------------------------------------------


def nodes(
    value: object, path: str = "", inside: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any, tuple[str, ...] | None]]:
    """Yield path, value and keys of a nested value and of everything in it; the keys of a leaf are None.

    Opens lists, tuples, dicts, dataclasses, types registered with PyTorch's trees (such as the outputs of
    transformers), and objects with tensors in their attributes (such as caches).

    Args:
        value: The value.
        path: The path to it.
        inside: The `id` of each value around it: one that holds itself is not opened again.
    """
    opened = _open(value, inside)
    if opened is None:
        yield path, value, None
        return
    yield path, value, tuple(key for key, _ in opened[0])
    for key, child in opened[0]:
        yield from nodes(child, path + key, (*inside, id(value)))


def leaves(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested value, with the path to each.

    Example:
        >>> sum(leaf for _, leaf in leaves({"a": [1, 2], "b": (3,)}))
        6
    """
    return ((where, node) for where, node, keys in nodes(value, path) if keys is None)


def mapped(value: object, function: Callable[[str, Any], Any], path: str = "", inside: tuple[int, ...] = ()) -> Any:
    """Return the same nested value with `function(path, leaf)` in place of each leaf.

    Example:
        >>> mapped({"a": [1, 2]}, lambda path, leaf: leaf * 10)
        {'a': [10, 20]}
    """
    opened = _open(value, inside)
    if opened is None:
        return function(path, value)
    children, remake = opened
    return remake([mapped(child, function, path + key, (*inside, id(value))) for key, child in children])


def each_tensor(function: Callable[[torch.Tensor], Any]) -> Callable[[str, Any], Any]:
    """Return a function for `mapped` that replaces tensors, and keeps other leaves.

    Example:
        >>> mapped([torch.ones(1), 2], each_tensor(torch.Tensor.tolist))
        [[1.0], 2]
    """
    return lambda _, leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _open(value: Any, inside: tuple[int, ...]) -> tuple[list[tuple[str, Any]], Remake] | None:
    """Return the children of a container, each with its key, and a function of as many others; None for a leaf."""
    kind = type(value)
    # A cycle would never end, and to follow a longer path takes too deep a stack.
    if isinstance(value, _PLAIN) or id(value) in inside or len(inside) == _DEEPEST:
        return None
    # One that is no dict may load files when it is asked.
    if issubclass(kind, dict) or (issubclass(kind, Mapping) and held_by([value])[0]):
        items = dict(dict.items(value) if issubclass(kind, dict) else value.items())
        return [(f"[{key!r}]", child) for key, child in items.items()], lambda new: _mapping(value, items, new)
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is not None:
            return [(f".{name}", child) for name, child in zip(fields, value, strict=True)], lambda new: kind(*new)
        return [(f"[{i}]", child) for i, child in enumerate(tuple.__iter__(value))], lambda new: kind(new)
    if isinstance(value, list):
        return [(f"[{i}]", child) for i, child in enumerate(list.__iter__(value))], lambda new: _list(value, new)
    # After lists and tuples, whose classes are registered, too, and whose items have better paths.
    node = registered_node(kind)
    if node is not None:
        children, context = node.flatten_fn(value)
        return [(f"[{i}]", child) for i, child in enumerate(children)], lambda new: node.unflatten_fn(new, context)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        held = {name: getattr(value, name) for name in fields if hasattr(value, name)}
    else:
        held = _named_attributes(value)
        if not held:
            return None
    names = list(held)
    return [(f".{name}", child) for name, child in held.items()], lambda new: _object(value, names, new)


def _named_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that holds tensors, those in slots, too; nothing for any other."""
    if isinstance(value, torch.nn.Module) or not held_by([value])[0]:
        return {}
    slots = [vars(cls) for cls in type(value).__mro__ if "__slots__" in vars(cls)]
    names = {name for found in slots for name in found if isinstance(found[name], types.MemberDescriptorType)}
    held = {name: getattr(value, name) for name in sorted(names) if hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _mapping(value: Mapping[Any, Any], keys: Iterable[Any], new: list[Any]) -> Any:
    node = registered_node(type(value))
    if node is not None and not isinstance(value, dict):
        return node.unflatten_fn(new, node.flatten_fn(value)[1])
    if not hasattr(value, "__setitem__"):  # an immutable one
        return cast(Any, type(value))(dict(zip(keys, new, strict=True)))
    made = cast("dict[Any, Any]", copy.copy(value))  # keeps the class, and what else it holds
    for key, child in zip(keys, new, strict=True):
        made[key] = child
    return made


def _list(value: list[Any], new: list[Any]) -> list[Any]:
    made = copy.copy(value)  # keeps the class, and attributes that it has
    made[:] = new
    return made


def _object(value: object, names: list[str], new: list[Any]) -> object:
    made = copy.copy(value)
    attributes = getattr(made, "__dict__", {})
    for name, child in zip(names, new, strict=True):
        if name in attributes:  # setting it could run a property of the class
            attributes[name] = child
        else:
            object.__setattr__(made, name, child)  # a slot, also that of a frozen dataclass
    return made


def memory_of(tensor: torch.Tensor) -> int | None:
    """Return a number that tensors share whose memory is the same; None for one without, such as a sparse tensor."""
    try:
        return storage_key(tensor)
    except (RuntimeError, NotImplementedError):
        return None
