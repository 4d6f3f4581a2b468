"""Nested values: what is in them, by path, and the same value with something else in its place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

from kernels_core.torch_internals import registered_node

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, torch.Size, torch.dtype, torch.device, type(None))

Remake = Callable[[list[Any]], Any]


def leaves(value: object, path: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield everything in a nested value that holds nothing itself, with the path to it.

    Looks into lists, tuples, dicts, dataclasses, what is registered with PyTorch's trees, such as the outputs of
    transformers, and objects with tensors in their attributes, such as caches.

    Args:
        value: The value.
        path: The path to it.
        inside: What it is held by, by id: one that holds itself is not looked into again.

    Example:
        >>> list(leaves({"a": [1, 2], "b": (3,)}))
        [("['a'][0]", 1), ("['a'][1]", 2), ("['b'][0]", 3)]
    """
    opened = _open(value, inside)
    if opened is None:
        yield path, value
        return
    for key, child in opened[0]:
        yield from leaves(child, path + key, (*inside, id(value)))


def tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a nested value, with the path to each."""
    return ((where, leaf) for where, leaf in leaves(value, path) if isinstance(leaf, torch.Tensor))


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


def containers(
    value: object, path: str = "", inside: tuple[int, ...] = ()
) -> Iterator[tuple[str, type, tuple[str, ...]]]:
    """Yield path, type and keys of everything in a nested value that holds something."""
    opened = _open(value, inside)
    if opened is not None:
        yield path, type(value), tuple(key for key, _ in opened[0])
        for key, child in opened[0]:
            yield from containers(child, path + key, (*inside, id(value)))


def _open(value: Any, inside: tuple[int, ...]) -> tuple[list[tuple[str, Any]], Remake] | None:
    """Return what a value holds, each with its key, and what makes another from as many; None if it holds nothing."""
    kind = type(value)
    if isinstance(value, (*_PLAIN, type)) or id(value) in inside:
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in value.items()], lambda new: _filled(value, new)
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is not None:
            return [(f".{name}", child) for name, child in zip(fields, value, strict=True)], lambda new: kind(*new)
        return [(f"[{i}]", child) for i, child in enumerate(value)], lambda new: kind(new)
    if isinstance(value, list):
        return [(f"[{i}]", child) for i, child in enumerate(value)], lambda new: _list(value, new)
    node = registered_node(kind)
    if node is not None:
        children, context = node.flatten_fn(value)
        return [(f"[{i}]", child) for i, child in enumerate(children)], lambda new: node.unflatten_fn(new, context)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [(f".{name}", getattr(value, name)) for name in names], lambda new: _dataclass(value, names, new)
    if _holds_tensors(value, 3):
        names = list(vars(value))
        return [(f".{name}", child) for name, child in vars(value).items()], lambda new: _object(value, names, new)
    return None


def _holds_tensors(value: object, depth: int) -> bool:
    """Whether an object of somebody else's has tensors in its attributes, at most so deep."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, (*_PLAIN, type)):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(child, depth) for child in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(child, depth) for child in value)
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or callable(value) or type(value).__module__.partition(".")[0] == "torch":
        return False
    return any(_holds_tensors(child, depth - 1) for child in attributes.values())


def _filled(value: Mapping[Any, Any], new: list[Any]) -> Any:
    node = registered_node(type(value))
    if node is not None and not isinstance(value, dict):
        return node.unflatten_fn(new, node.flatten_fn(value)[1])
    if not hasattr(value, "__setitem__"):  # one that cannot be changed
        return cast(Any, type(value))(dict(zip(value, new, strict=True)))
    filled = cast("dict[Any, Any]", copy.copy(value))
    for key, child in zip(value, new, strict=True):
        filled[key] = child
    return filled


def _list(value: list[Any], new: list[Any]) -> list[Any]:
    made = copy.copy(value)
    made[:] = new
    return made


def _dataclass(value: object, names: list[str], new: list[Any]) -> object:
    made = copy.copy(value)
    for name, child in zip(names, new, strict=True):
        object.__setattr__(made, name, child)  # also where it is frozen
    return made


def _object(value: object, names: list[str], new: list[Any]) -> object:
    made = copy.copy(value)
    vars(made).update(zip(names, new, strict=True))
    return made
