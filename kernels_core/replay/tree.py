"""Nested values: everything in them by path, and the same value with other leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

from ..torch_internals import registered_node, storage_key

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, torch.Size, torch.dtype, torch.device, type(None), type)

Remake = Callable[[list[Any]], Any]


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
    if isinstance(value, _PLAIN) or id(value) in inside:  # a cycle would never end
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in value.items()], lambda new: _mapping(value, new)
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is not None:
            return [(f".{name}", child) for name, child in zip(fields, value, strict=True)], lambda new: kind(*new)
        return [(f"[{i}]", child) for i, child in enumerate(value)], lambda new: kind(new)
    if isinstance(value, list):
        return [(f"[{i}]", child) for i, child in enumerate(value)], lambda new: _list(value, new)
    # After lists and tuples, whose classes are registered, too, and whose items have better paths.
    node = registered_node(kind)
    if node is not None:
        children, context = node.flatten_fn(value)
        return [(f"[{i}]", child) for i, child in enumerate(children)], lambda new: node.unflatten_fn(new, context)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        held = {name: getattr(value, name) for name in fields if hasattr(value, name)}
    elif _holds_tensors(value, 3):
        held = vars(value)
    else:
        return None
    names = list(held)
    return [(f".{name}", child) for name, child in held.items()], lambda new: _object(value, names, new)


def _holds_tensors(value: object, depth: int) -> bool:
    """Whether an object of a foreign class has tensors in its attributes, at most so deep."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, _PLAIN):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(child, depth) for child in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(child, depth) for child in value)
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or callable(value) or type(value).__module__.partition(".")[0] == "torch":
        return False
    return any(_holds_tensors(child, depth - 1) for child in attributes.values())


def _mapping(value: Mapping[Any, Any], new: list[Any]) -> Any:
    node = registered_node(type(value))
    if node is not None and not isinstance(value, dict):
        return node.unflatten_fn(new, node.flatten_fn(value)[1])
    if not hasattr(value, "__setitem__"):  # an immutable one
        return cast(Any, type(value))(dict(zip(value, new, strict=True)))
    made = cast("dict[Any, Any]", copy.copy(value))  # keeps the class, and what else it holds
    for key, child in zip(value, new, strict=True):
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
