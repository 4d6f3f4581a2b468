"""The decorated functions of a model: those that its modules declare or hold, and those that a forward calls."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from torch import nn

from ..errors import ArgumentTypeError
from ..generated import dispatched_layer
from ..layer import Forward, Layer
from ..nested import CONTAINERS, MAPPINGS, items_of

_CALLABLE = (types.FunctionType, types.MethodType)
_HOLDERS = (*_CALLABLE, *CONTAINERS, functools.partial, functools.partialmethod, staticmethod, classmethod)
_MOST = 10_000
"""Items that are looked at for one attribute or one name in code: a vocabulary has more, and no functions."""

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
    short = [f.reference.__name__ if f.is_function else f.qualname.rpartition(".")[2] for f in functions]
    kinds = [short, [f.qualname for f in functions]]
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
    """Yield the layers of decorated functions among values, and inside of containers and partials."""
    for value in _callables(values):
        layer = dispatched_layer(value)
        if layer is not None and layer.is_function:
            yield layer


def _callables(values: Iterable[object], *, classes: bool = False) -> Iterator[Any]:
    """Yield the functions among values, and inside of containers and partials; the modules' classes in mappings, too.

    Nothing of other values is read, not even `__class__` or a `values` of their own: lazy ones would load files.
    """
    opened, left = set[int](), _MOST
    stack = [iter(values)]
    while stack:
        value: Any = next(stack[-1], stack)  # the stack marks the end of a container: no container holds it
        if value is stack:
            stack.pop()
        elif issubclass(type(value), _HOLDERS) and id(value) not in opened:
            opened.add(id(value))
            items: tuple[Any, ...] = ()
            if isinstance(value, _CALLABLE):
                yield value
            elif isinstance(value, staticmethod | classmethod):  # as they lie in the dict of a class
                items = (value.__func__,)
            elif isinstance(value, functools.partial | functools.partialmethod):
                items = (value.func, *value.args, *value.keywords.values())
            else:
                items = tuple(islice(items_of(value), left + 1))
                if len(items) > left:
                    continue
                left -= len(items)
                if classes and issubclass(type(value), MAPPINGS):  # a tuple of classes is for `isinstance`, mostly
                    firsts = (item[0] if type(item) is tuple and item else item for item in items)
                    yield from (item for item in firsts if issubclass(type(item), type) and issubclass(item, nn.Module))
            stack.append(iter(items))


def called_by(forward: Forward, cls: type[nn.Module]) -> tuple[Layer, ...]:
    """Return the layers of the decorated functions that the code of a forward names: it may call them.

    Follows functions of the same file, methods of the class of its module, and what lies in containers that the code
    names: such as `ACT2FN` of transformers, with classes of which the code makes a module for its call.
    """
    found: dict[Layer, None] = {}
    followed = set[tuple[types.CodeType, type]]()
    waiting: list[tuple[Any, type[nn.Module]]] = [(forward, cls)]
    while waiting:
        function, cls = waiting.pop()
        of_class = issubclass(type(function), type)
        if of_class:
            function, cls = function.forward, function
        layer = dispatched_layer(function)
        if layer is not None and (layer.is_function or of_class):
            found[layer] = None
            continue
        wrapped = getattr(function, "__wrapped__", None)  # also of a decorator that is an object
        if wrapped is not None:
            waiting.append((wrapped, cls))
        if not isinstance(function, types.FunctionType) or (function.__code__, cls) in followed:
            continue
        followed.add((function.__code__, cls))  # by code: each closure is another function of it
        waiting += ((value, cls) for value in _named(function, cls) if isinstance(value, types.FunctionType | type))
    return tuple(found)


def _named(function: types.FunctionType, cls: type[nn.Module]) -> Iterator[object]:
    """Yield the values that the code of a function names: functions decorated or of its file, methods, and classes.

    Classes only of mappings: a module that a forward makes is no part of the model.
    """
    names = dict.fromkeys(_names(function.__code__))
    methods = [name for name in names if name != "forward"]  # which is that of a child, mostly
    known: Mapping[str, Any] = function.__globals__
    values: list[Any] = [known[name] for name in names if name in known]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # the cell is empty yet
            continue
    for holder in [value for value in values if issubclass(type(value), types.ModuleType | type)]:
        for place in holder.__mro__ if issubclass(type(holder), type) else (holder,):
            # `vars`: a module that loads names lazily would import them for `getattr`.
            values += (vars(place)[name] for name in methods if name in vars(place))
    for table in [value for value in values if issubclass(type(value), Mapping)]:
        for place in (table, *type(table).__mro__) if not issubclass(type(table), MAPPINGS) else ():
            # Such as a `UserDict`: its own methods may load files.
            values += (part for part in getattr(place, "__dict__", {}).values() if issubclass(type(part), dict))
    for value in _callables(values, classes=True):
        value = getattr(value, "__func__", value)
        if isinstance(value, type) or getattr(value, "__globals__", None) is known or dispatched_layer(value):
            yield value
    for name in methods:
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
