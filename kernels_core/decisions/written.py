"""`written`: the statements of files about global names: the same in every process, also once calls fill a table."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import sys
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_GLOBAL = re.compile(r"^[ \t]+global[ \t]+(.*)", re.MULTILINE)
_INDENTED = re.compile(r"^[ \t].*", re.MULTILINE)
_ATTRIBUTE = re.compile(r"(?<!\bself)(\.\w+)[ \t]*[-+*/|&]{0,2}=(?!=)")
"""One that a function may set on a class: `cls.calls += 1`."""

_DRAWN = re.compile(
    r"^(\w+)\b.*=.*\b(?:uuid\d?|random|urandom|secrets|time|datetime|getpid|mkdtemp|gethostname)\b.*\(", re.MULTILINE
)
"""A name that has another value in each process, such as the id of a session in transformers."""

_MOST = 64_000
"""Bytes of a file of an installed package that is parsed: the largest of `transformers` take half a second together."""

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def is_installed(file: str) -> bool:
    """Whether a file is in a folder of installed packages: it changes with the version of its package."""
    return any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def written(
    namespace: Mapping[str, Any], names: Iterable[str], is_own: Callable[[str], bool]
) -> tuple[list[str], list[Any]]:
    """Return the statements of a file that set global names, or change them while it is imported.

    A list, a dict or an object may be filled by calls: its value at one moment would be another one in each process.

    Args:
        namespace: The globals of the module.
        names: The names; `Class.name` for what the body of a class sets.
        is_own: Whether names that are imported from a module are looked up there.

    Returns:
        The texts of the statements, also of those about the names that they read; and the functions and classes that
        these name. Nothing for code without a file, as at a prompt.
    """
    texts: list[str] = []
    code: list[Any] = []
    seen = set[tuple[str, str]]()
    waiting = [(namespace, name) for name in names]
    while waiting:
        space, name = waiting.pop()
        file = space.get("__file__")
        if not isinstance(file, str) or (file, name) in seen:
            continue
        seen.add((file, name))
        by_name = _read(file).by_name
        for statement in by_name.get(name, by_name.get("*", [])):
            for node in ast.walk(statement):  # also one in `try`
                if isinstance(node, ast.ImportFrom) and {name, "*"} & {*_imported(node)}:
                    place, original = _source(node, name, space)
                    if place in sys.modules and is_own(place):
                        waiting.append((vars(sys.modules[place]), original))
            if isinstance(statement, ast.ImportFrom) or name not in by_name:
                continue
            texts.append(f"{name} {ast.dump(statement)}")
            for read in sorted({node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}):
                value = space.get(read)
                if isinstance(value, types.FunctionType | type):
                    code.append(value)
                elif not isinstance(value, types.ModuleType):
                    waiting.append((space, read))
    return texts, code


def _imported(statement: ast.ImportFrom) -> list[str]:
    return [one.asname or one.name for one in statement.names]


def _source(statement: ast.ImportFrom, name: str, space: Mapping[str, Any]) -> tuple[str, str]:
    """Return the module from which a statement imports a name, and the name there."""
    place = "." * statement.level + (statement.module or "")
    try:
        place = importlib.util.resolve_name(place, space.get("__package__"))
    except ImportError:  # a program that is no package, where the statement has failed
        place = ""
    return place, next((one.name for one in statement.names if (one.asname or one.name) == name), name)


def set_by_calls(namespace: Mapping[str, Any]) -> frozenset[str]:
    """Return the global names that functions of a module set, or draw; and attributes as `.name`: these are a state."""
    file = namespace.get("__file__")
    return _read(file).set_by_calls if isinstance(file, str) else frozenset()


@dataclass(frozen=True)
class _File:
    by_name: Mapping[str, list[ast.stmt]] = field(default_factory=dict)
    """The statements outside of functions by the names that they are about."""
    set_by_calls: frozenset[str] = frozenset()


def _read(file: str) -> _File:
    try:
        found = os.stat(file)
        return _parsed(file, found.st_mtime_ns, found.st_size <= _MOST or not is_installed(file))
    except (OSError, ValueError, SyntaxError):  # not there, or no source
        return _File()


@functools.lru_cache(maxsize=256)
def _parsed(file: str, changed: int, whole: bool) -> _File:
    with tokenize.open(file) as source:
        text = source.read()
    found: dict[str, list[ast.stmt]] = {}
    for prefix, statement in _statements(ast.parse(text).body if whole else (), ""):
        for name in dict.fromkeys(_about(statement)):
            found.setdefault(prefix + name, []).append(statement)
    # Not in the tree: to walk through all functions takes longer than to parse them.
    names = re.findall(r"\w+", " ".join(_GLOBAL.findall(text))) + _DRAWN.findall(text)
    return _File(found, frozenset([*names, *_ATTRIBUTE.findall("\n".join(_INDENTED.findall(text)))]))


def _statements(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the statements outside of functions, with the class that they are in."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from _statements(statement.body, f"{prefix}{statement.name}.")
        elif not isinstance(statement, _DEFINITIONS):
            if any(isinstance(node, _DEFINITIONS) for node in ast.walk(statement)):
                parts = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
                parts += [handler.body for handler in getattr(statement, "handlers", [])]
                for part in parts:
                    yield from _statements(part, prefix)
            elif not (isinstance(statement, ast.If) and "__main__" in ast.dump(statement.test)):
                yield prefix, statement


def _about(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement sets, or that it may change: as in `TABLE["a"] = 1`, and `fill(TABLE)`."""
    for node in ast.walk(statement):
        if isinstance(node, ast.ImportFrom):
            yield from _imported(node)
        elif isinstance(node, ast.Name) and (
            isinstance(node.ctx, ast.Store | ast.Del) or isinstance(statement, ast.Expr)
        ):
            yield node.id
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            inner: ast.expr = node
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield f"{node.value.id}.{node.attr}"
            while isinstance(inner, ast.Attribute | ast.Subscript):
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield inner.id
        elif isinstance(node, ast.Expr):  # inside of `if` and `for`
            yield from (one.id for one in ast.walk(node) if isinstance(one, ast.Name))
