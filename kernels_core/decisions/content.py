"""`content_of`: a digest of the code of a kernel that is not from the Hub, equal in all processes of one program."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .written import is_installed, set_by_calls, written

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_NO_CODE = ("__", "_abc", "kernels_", "_kernels_")
"""How the names of attributes of a class begin that Python and the core make, some of them later."""

_CODE = (type, types.FunctionType)
_WRAPPED = (types.MethodType, staticmethod, classmethod)

_BUILT_IN = ("torch", "builtins")
"""Packages whose classes are known by their names: the version of PyTorch is that of the program."""

_OURS = ("kernels_core", "kernels_plugins")


def in_program(text: str) -> str:
    """Return a text with the name of the program in place of `__main__`: as a module that imports it has it.

    So `kernels-core freeze train:model` and `python train.py` write the same.
    """
    main: Any = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", "") or Path(getattr(main, "__file__", None) or "").stem
    return re.sub(r"\b__main__(?=\.)", name.removesuffix(".__main__"), text) if name else text


_known: weakref.WeakKeyDictionary[object, dict[bool, str]] = weakref.WeakKeyDictionary()


def content_of(kernel: object, *, on_any_rank: bool = False) -> str:
    """Return a digest of a class or function, and of the functions and classes of its package that it names.

    Of its package, or of other files of the folder that its package is in, if that is not where packages are installed.
    By their code and constants, not by their files: other lines of a file may change. Global names that have lists,
    dicts, tensors or other objects count as their files set them. Empty for a kernel without code in Python.

    Args:
        kernel: The class or function.
        on_any_rank: Whether all values of global names but floating-point numbers count as their files set them: the
            values may be the number of a rank, its device, or a state.

    Example:
        >>> content_of(len), len(content_of(content_of))
        ('', 64)
    """
    with contextlib.suppress(TypeError):  # of one without a hash, or without weak references
        if on_any_rank in _known.get(kernel, ()):
            return _known[kernel][on_any_rank]
    lines = list(_lines(kernel, on_any_rank))
    text = hashlib.sha256("\n".join(lines).encode(errors="replace")).hexdigest() if lines else ""
    with contextlib.suppress(TypeError):  # not kept then, and computed again each time
        _known.setdefault(kernel, {})[on_any_rank] = text
    return text


def _lines(kernel: object, on_any_rank: bool) -> Iterator[str]:
    """Yield a text for each piece of code, in an order that does not depend on the process."""
    waiting, followed = [kernel], set[int]()
    module = getattr(kernel, "__module__", None) or ""
    while waiting:
        value: Any = waiting.pop()
        if isinstance(value, _WRAPPED):  # no other is asked: a lazy object may load files for a name that it lacks
            value = value.__func__
        if isinstance(value, types.FunctionType) and "_kernels_cold" in value.__globals__:
            value = vars(value)["kernels_layer"].reference  # generated code: its names count the decorated layers
        # The code of an object of the package, such as one that a kernel keeps and calls. Ranks compare no objects.
        if not (on_any_rank or isinstance(value, _CODE)) and _is_own(type(value).__module__, module):
            value = type(value)
        for name in ("fn", "func", "fget"):  # of kernels in Triton, partials and properties
            inner = inspect.getattr_static(value, name, None)
            waiting += [inner] if isinstance(inner, types.FunctionType) else []
        if id(value) in followed:  # functions may name each other
            continue
        followed.add(id(value))
        if isinstance(value, type):
            spaces = [vars(sys.modules.get(base.__module__, types.ModuleType(""))) for base in value.__mro__]
            calls = frozenset[str]().union(*map(set_by_calls, spaces))  # one of a base sets attributes on all below it
            for base, place in zip(value.__mro__, spaces, strict=True):
                if base.__module__.partition(".")[0] not in _BUILT_IN:
                    held = {name: vars(base)[name] for name in sorted(vars(base)) if _is_member(name)}
                    state = {name for name, one in held.items() if f".{name}" in calls and not _is_code(one)}
                    members = {name: member for name, member in held.items() if name not in state}
                    yield from (f"{base.__qualname__}.{name} {_text(member)}" for name, member in members.items())
                    waiting += members.values()
                    inexact = [name for name, one in held.items() if name in state or not _is_exact(one)]
                    names = [f"{base.__qualname__}.{name}" for name in inexact]
                    texts, code = written(place, names, functools.partial(_is_own, of=base.__module__))
                    yield from texts
                    waiting += [one for one in code if _is_followed(one, base)]
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            constants = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells]
            yield f"{value.__qualname__} {_text(value.__code__)} {[*map(_text, constants)]}"
            own = functools.partial(_is_own, of=value.__module__)
            for space, named in _named(value, own):
                counts, kept = _is_shared if on_any_rank else _is_exact, set_by_calls(space)
                exact = [name for name, one in named.items() if counts(one) and name not in kept]
                yield str([_text(named[name]) for name in exact])
                texts, code = written(space, [name for name in named if name not in exact], own)
                yield from texts
                constants += [one for name, one in named.items() if name not in kept or _is_code(one)] + code
            waiting += [one for one in [*constants, *_parts(constants)] if _is_followed(one, value)]
            waiting += [getattr(value, "__wrapped__", None)]


def _named(function: types.FunctionType, own: Callable[[str], bool]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the globals of a function, and those of modules that it names, each with the values that its code names."""
    # Names of attributes, too: a code object does not tell them from globals. That adds code, and hides none.
    names, spaces = sorted(set(_names(function.__code__))), [function.__globals__]
    for space in spaces:
        named = {name: space[name] for name in names if name in space}
        modules = [named.pop(name) for name in [*named] if isinstance(named[name], types.ModuleType)]
        yield space, named
        spaces += [
            vars(one) for one in modules if own(one.__name__) and all(vars(one) is not known for known in spaces)
        ]


def _is_member(name: str) -> bool:
    return name in ("__call__", "__init__") or not name.startswith(_NO_CODE)


def _parts(values: list[Any]) -> list[Any]:
    return [part for value in values if isinstance(value, tuple) for part in value]


def _is_followed(value: Any, of: types.FunctionType | type) -> bool:
    """Whether a value is code of the package of a function, or beside it: that of others is known by its name."""
    place = getattr(value, "__module__", None)
    return isinstance(place, str) and _is_own(place, of.__module__)


def _is_own(module: str, of: str) -> bool:
    """Whether a module is in the package of another one, or beside it in a folder that is not for installed ones."""
    package = _package(module)
    if package == _package(of):
        return True
    return package not in (*_BUILT_IN, *_OURS) and _folder(module) == _folder(of) != ""


def _folder(module: str) -> str:
    """Return the folder that a module is imported from; empty for installed ones: these change with their versions."""
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(os.path.abspath(file)) if isinstance(file, str) else Path()
    place = [*path.parents][in_program(f"{module}.").count(".") - (path.stem != "__init__") :]
    return str(place[0]) if place and not is_installed(str(path)) else ""


def _is_exact(value: Any) -> bool:
    """Whether the text of a value tells all of it, or its code does."""
    if isinstance(value, tuple | frozenset):
        return all(map(_is_exact, value))
    return isinstance(value, _SIMPLE) or _is_code(value)


def _is_code(value: Any) -> bool:
    return isinstance(value, (*_CODE, staticmethod, classmethod, property))


def _is_shared(value: Any) -> bool:
    """Whether a value of a global name is the same on all ranks that run the same program with the same settings."""
    return isinstance(value, float | type | types.FunctionType)


def _package(module: str) -> str:
    return in_program(f"{module}.").partition(".")[0]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _text(value: Any) -> str:
    """Return a text for a value that is the same in every process."""
    if isinstance(value, types.CodeType):
        constants = [_text(constant) for constant in value.co_consts]
        # No line numbers and no file name: a moved function is the same code.
        return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {constants}"
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, tuple):  # a mutable value may differ at each call
        return str([*map(_text, value)])
    if isinstance(value, frozenset):  # their order depends on the hashes of a process
        return str(sorted(map(_text, value)))
    named = value if isinstance(value, type | types.FunctionType) else type(value)  # its `repr` may have an address
    return named.__qualname__


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
