"""The decorated functions of a model: those that its modules declare or hold, and those that a forward calls."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from ..errors import ArgumentTypeError
from ..generated import dispatched_layer
from ..layer import Forward, Layer

_CALLABLE = (types.FunctionType, types.MethodType)
_ITEMS = (list, tuple, set, frozenset, deque)
_MAPPINGS = (dict, types.MappingProxyType)
_HOLDERS = (*_CALLABLE, *_ITEMS, *_MAPPINGS, functools.partial, functools.partialmethod, staticmethod, classmethod)
OF_TORCH = frozenset(nn.Module().__dict__)
"""The attributes that any module has: with no others, it holds nothing of its class or of another library."""


def functions_of(module: nn.Module | type[nn.Module]) -> tuple[Layer, ...]:
    """Return the layers of the decorated functions that a module declares or holds, each once.

    Args:
        module: A module, or a class for those of all its modules.

    Returns:
        Those that `use_kernelized_func` names, and those in attributes of the module or its class, also inside of
        lists, tuples, sets, dicts, partials and bound methods; not those in attributes of other objects.

    Raises:
        ArgumentTypeError: If it is neither a module nor a class.

    Example:
        >>> functions_of(torch.nn.Linear)
        ()
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x):
        ...     return x + x
        >>> model = torch.nn.Identity()
        >>> model.activations = {"double": double}
        >>> functions_of(model)
        (<Layer 'double' at ...double>,)
    """
    if not isinstance(module, nn.Module | type):
        raise ArgumentTypeError(f"functions_of takes an nn.Module or a class of modules, not {module!r}.")
    cls = module if isinstance(module, type) else type(module)
    found: Iterable[Layer] = getattr(cls, "kernels_functions", ())
    for base in cls.__mro__:
        if base is not nn.Module and base is not object:
            found = chain(found, _held(value for name, value in tuple(vars(base).items()) if name != "forward"))
    return tuple(dict.fromkeys(chain(found, held_by(module) if cls is not module else ())))


def names_of(functions: Sequence[Layer]) -> list[str]:
    """Return a name for each function of a module, which no other has, or one would hide the other's decision."""
    kinds = [[f.reference.__name__ for f in functions], [f.qualname for f in functions]]
    kinds.append([f"{f.qualname} as {f.name}" for f in functions])
    return next((names for names in kinds if len(set(names)) == len(names)), kinds[-1])


def held_by(module: Any) -> tuple[Layer, ...]:
    """Return the layers of the decorated functions that a module holds in attributes of its own."""
    own = module.__dict__
    if own.keys() <= OF_TORCH:  # most modules, at the price of one comparison
        return ()
    values = [own[name] for name in own if name not in OF_TORCH and name != "forward"]
    return tuple(dict.fromkeys(_held(values))) if any(issubclass(type(value), _HOLDERS) for value in values) else ()


def _held(values: Iterable[object]) -> Iterator[Layer]:
    """Yield the layers of decorated functions among values, and inside of containers and partials.

    Nothing of other values is read, not even `__class__` or a `values` of their own: lazy ones would load files.
    """
    opened = set[int]()
    stack = [iter(values)]
    while stack:
        value: Any = next(stack[-1], stack)  # the stack marks the end of a container: no container holds it
        if value is stack:
            stack.pop()
        elif issubclass(type(value), _HOLDERS) and id(value) not in opened:
            opened.add(id(value))
            if isinstance(value, _CALLABLE):
                layer = dispatched_layer(value)
                if layer is not None and layer.is_function:
                    yield layer
            elif isinstance(value, _ITEMS):
                stack.append(iter(tuple(value)))
            elif isinstance(value, _MAPPINGS):
                stack.append(iter(tuple(dict.values(value) if isinstance(value, dict) else value.values())))
            elif isinstance(value, staticmethod | classmethod):  # as they lie in the dict of a class
                stack.append(iter((value.__func__,)))
            else:
                stack.append(iter((value.func, *value.args, *value.keywords.values())))


def called_by(forward: Forward, cls: type[nn.Module]) -> tuple[Layer, ...]:
    """Return the layers of the decorated functions that the code of a forward names: it may call them.

    Follows functions of the same file, and methods of the class of its module.
    """
    found: dict[Layer, None] = {}
    followed = set[types.CodeType]()
    waiting: list[object] = [forward]
    while waiting:
        function: Any = waiting.pop()
        layer = dispatched_layer(function)
        if layer is not None and layer.is_function:
            found[layer] = None
            continue
        wrapped = getattr(function, "__wrapped__", None)  # also of a decorator that is an object
        if wrapped is not None:
            waiting.append(wrapped)
        if not isinstance(function, types.FunctionType) or function.__code__ in followed:
            continue
        followed.add(function.__code__)  # by code: each closure is another function of it
        waiting += (value for value in _named(function, cls) if isinstance(value, types.FunctionType))
    return tuple(found)


def _named(function: types.FunctionType, cls: type[nn.Module]) -> Iterator[object]:
    """Yield the decorated functions, those of the same file and the methods that the code of a function names."""
    names = dict.fromkeys(_names(function.__code__))
    known: Mapping[str, Any] = function.__globals__
    values = [known[name] for name in names if name in known]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # the cell is empty yet
            continue
    for module in [value for value in values if isinstance(value, types.ModuleType)]:
        # `vars`: a module that loads names lazily would import them for `getattr`.
        values += (vars(module)[name] for name in names if name in vars(module))
    for value in values:
        if isinstance(value, types.FunctionType) and (value.__globals__ is known or dispatched_layer(value)):
            yield value
    for name in names.keys() - {"forward"}:  # of a child, mostly
        for base in cls.__mro__:
            if name in vars(base):
                if base is not nn.Module:
                    yield getattr(vars(base)[name], "__func__", vars(base)[name])
                break


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a piece of code, and in the functions that it makes."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
