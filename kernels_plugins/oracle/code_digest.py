"""A digest of an implementation: its file, its code, and the values that its code names."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kernels_core import content_of, source_label

_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40,64})/")
_SIMPLE = (str, bytes, int, float, bool, type(None), torch.dtype)
_OWN_WRAPPERS = ("kernels_core", "kernels_plugins")
_OF_VERSIONS = {*sys.stdlib_module_names, "torch"}
"""Packages whose code changes with their version only; that of PyTorch is in each key."""


def unwrapped(function: Callable[..., Any]) -> Any:
    """Return a function without the wrappers that plugins of this package put around kernels.

    Not without others: a kernel that wraps its reference, as `torch.compile` does, is no reference.
    """
    inner: Any = getattr(function, "__func__", function)
    while (within := getattr(inner, "__wrapped__", None)) is not None:
        if str(getattr(inner, "__globals__", {}).get("__name__")).partition(".")[0] not in _OWN_WRAPPERS:
            break
        inner = getattr(within, "__func__", within)
    return inner


def digest_of(function: Callable[..., Any]) -> str | None:
    """Return a digest of a function: its file, code, defaults and closure, and the globals that it reads.

    Of tables and other objects, what files of its package, or beside it, write about them: see `content_of`.
    None if there is no file. A file from the Hub has its commit in its path, which identifies all files beside it, too.
    """
    inner = unwrapped(function)
    if getattr(inner, "__code__", None) is None:
        return None
    digest = hashlib.sha256(f"{source_label(inner)} {content_of(inner, on_any_rank=True)}".encode())
    for place in _files_of(inner):
        if commit := _COMMIT.search(place.replace(os.sep, "/")):
            digest.update(commit[1].encode())
        try:
            digest.update(Path(place).read_bytes())
        except OSError:  # written at a prompt, or generated
            return None
    texts = _Texts()
    texts.of(inner)
    texts = _Texts(texts.stored)  # what one function sets, another one may have read before
    digest.update(repr([texts.of(inner), *texts.of_attributes(getattr(function, "__self__", None))]).encode())
    return digest.hexdigest()


def _files_of(function: Any) -> Iterator[str]:
    """Yield the file of a function, and those of the functions that it wraps: a decorator of PyTorch has its own."""
    while function is not None:
        if code := getattr(function, "__code__", None):
            yield code.co_filename
        function = getattr(function, "__wrapped__", None)


def attributes_read(function: Callable[..., Any], module: torch.nn.Module | None) -> dict[str, object]:
    """Return the simple attributes of a module that the code of a function, or of functions that it calls, names."""
    if module is None:
        return {}
    texts = _Texts()
    texts.of(unwrapped(function))
    values = {name: inspect.getattr_static(module, name, module) for name in sorted(texts.attributes - texts.stored)}
    return {name: value for name, value in values.items() if isinstance(value, _SIMPLE) and name != "training"}


class _Texts:
    """Texts of values that are the same in every process.

    Values that change from call to call, such as lists, dicts, tensors, and names that the code itself sets, are left
    out: a key with them would be another one at each call.
    """

    def __init__(self, stored: Iterable[str] = ()) -> None:
        self.attributes: set[str] = set()
        self.stored = set(stored)
        self._seen: set[int] = set()

    def of(self, value: Any) -> str:
        """Return the text of a value."""
        if isinstance(value, _SIMPLE):
            return repr(value)
        if isinstance(value, tuple):
            return str([self.of(item) for item in value])
        value = _function_in(value)
        if isinstance(value, types.FunctionType):
            return f"{_text_of(value.__code__)} {list(self._used(value))}"
        if isinstance(value, types.ModuleType):
            return value.__name__  # its path is another one on another machine
        return source_label(value if isinstance(value, type) else type(value))

    def of_attributes(self, owner: object) -> list[str]:
        """Return texts of the simple attributes of an object that the code so far has named."""
        found = ((name, inspect.getattr_static(owner, name, owner)) for name in sorted(self.attributes - self.stored))
        return [f"{name} {self.of(value)}" for name, value in found if isinstance(value, _SIMPLE) and owner is not None]

    def _used(self, function: types.FunctionType) -> Iterator[str]:
        """Yield texts of the defaults, the closure, and the globals that a function reads."""
        if id(function) in self._seen or (function.__module__ or "").partition(".")[0] in _OF_VERSIONS:
            return
        self._seen.add(id(function))
        names, attributes, stored = _names_in(function.__code__)
        self.attributes |= attributes
        self.stored |= stored
        yield from map(self.of, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        held = [cell.cell_contents for name, cell in cells if name not in self.stored and is_filled(cell)]
        for value in held:
            yield self.of(value)
        read = {
            name: function.__globals__[name] for name in sorted(names - self.stored) if name in function.__globals__
        }
        for name, value in read.items():
            yield f"{name} {self.of(value)}"
        for value in (*held, *read.values()):
            yield from self._inside(value, attributes - self.stored)

    def _inside(self, value: object, names: set[str]) -> Iterator[str]:
        """Yield texts of the items of a class or module that code names."""
        if not isinstance(value, type | types.ModuleType) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        own = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        if own.partition(".")[0] in _OF_VERSIONS:
            return
        namespaces: list[Mapping[str, Any]] = [vars(one) for one in getattr(value, "__mro__", (value,))]
        for name in sorted(names):
            for namespace in namespaces:
                if name in namespace:
                    yield f"{own}.{name} {self.of(namespace[name])}"
                    break


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> tuple[set[str], set[str], set[str]]:
    """Return the globals and the attributes that code reads, and the names that it sets."""
    read, attributes, stored = set(), set(), set()
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        is_nonlocal = kind == "STORE_DEREF" and name in code.co_freevars
        if is_nonlocal or kind in ("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL", "DELETE_ATTR"):
            stored.add(name)
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(name)
        elif isinstance(name, str) and name in code.co_names:
            attributes.add(name)
    for inner in (const for const in code.co_consts if inspect.iscode(const)):
        for names, more in zip((read, attributes, stored), _names_in(inner), strict=True):
            names |= more
    return read, attributes, stored


def _text_of(code: types.CodeType) -> str:
    return f"{code.co_code.hex()} {code.co_names} {[_text_of_const(const) for const in code.co_consts]}"


def _text_of_const(const: object) -> str:
    if isinstance(const, frozenset):  # of `in {"a", "b"}`: each process has another order
        return f"frozenset {sorted(map(_text_of_const, const))}"
    return _text_of(const) if isinstance(const, types.CodeType) else repr(const)


def _function_in(value: Any) -> Any:
    """Return the function in a method, a cache, or a kernel of Triton, also one that is tuned; else the value."""
    while not isinstance(value, types.FunctionType):
        value = getattr(value, "__func__", value)
        within = inspect.getattr_static(value, "fn", inspect.getattr_static(value, "__wrapped__", value))
        if within is value or isinstance(value, type):
            break
        value = within
    return value


def is_filled(cell: Any) -> bool:
    """Whether a cell of a closure has a value."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
