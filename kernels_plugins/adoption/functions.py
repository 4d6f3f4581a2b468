"""Forwards that call a function under another name: one class then dispatches it, and no other caller is touched.

A forward finds a function in the globals of its file, which all models share. The forward of an adopted class is the
same code, but for that name: under the new one, the same globals hold the dispatching function. So everything else of
the globals stays as it is, also where it changes later.
"""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

_numbers = itertools.count()
_AT_MOST = 10_000
"""Objects to search in what a decorator keeps: it keeps a few, or something too huge to be searched."""


def caller_of(forward: object, name: str) -> FunctionType | None:
    """Return the function that loads a global of that name: a forward, or one inside of its decorators."""
    seen = set[int]()
    waiting = [forward]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, FunctionType):
            if name in function.__globals__ and _uses(function.__code__, name).count("LOAD_GLOBAL"):
                return function
            waiting += (each for each in _contents(function) if isinstance(each, FunctionType))
        waiting += [each] if (each := inspect.getattr_static(function, "__wrapped__", None)) is not None else []
    return None


@functools.lru_cache(maxsize=256)  # the same copy again, so that compiled code can be used again
def calling(forward: Any, name: str, value: Callable[..., Any]) -> FunctionType:
    """Return a copy of a forward in which a global name stands for another value; the same one again.

    Raises:
        ValueError: If no copy would be exact; the text says why.
    """
    if not isinstance(forward, FunctionType):
        raise ValueError(f"its forward is wrapped by a {type(forward).__qualname__}, which cannot be copied")
    uses = _uses(forward.__code__, name)
    if name in forward.__globals__ and "LOAD_GLOBAL" in uses:
        if set(uses) != {"LOAD_GLOBAL"}:
            raise ValueError(f"its forward uses the name {name} for something else, too")
        unique = f"{name}__adopted_{next(_numbers)}"
        code = _renamed(forward.__code__, name, unique)
        forward.__globals__[unique] = value
        # With the code, not with the class: whoever still holds the forward can call it. The code before is kept as
        # long: it may be a copy, too, whose name this one still uses.
        weakref.finalize(code, _drop, forward.__globals__, unique, forward.__code__).atexit = False
        return _copied(forward, code, forward.__closure__)
    return _around(forward, lambda each: caller_of(each, name) is not None, lambda inner: calling(inner, name, value))


def replacing(forward: Any, make: Callable[[FunctionType], FunctionType]) -> FunctionType:
    """Return a copy of the decorators of a forward, around the function that is made of the one inside of them.

    A wrapper that knows itself is left out: that of `__init_subclass__`, which wraps the forward of a new class anew.

    Raises:
        ValueError: If no copy would be exact; the text says why.
    """
    if not isinstance(forward, FunctionType):
        raise ValueError(f"its forward is wrapped by a {type(forward).__qualname__}, which cannot be copied")
    inner = vars(forward).get("__wrapped__")
    if inner is None:
        return make(forward)
    if any(each is forward for each in _contents(forward)):
        return replacing(inner, make)
    return _around(forward, lambda each: each is inner, lambda inner: replacing(inner, make))


def _around(
    forward: FunctionType, is_inner: Callable[[object], bool], make: Callable[[Any], FunctionType]
) -> FunctionType:
    """Return a copy of a decorator's function that keeps another function in place of the one inside."""
    cells = forward.__closure__ or ()
    inside = [index for index, each in enumerate(_contents(forward)) if is_inner(each)]
    if len(inside) != 1:
        raise ValueError("its forward is wrapped by a decorator that does not keep it in one variable of its own")
    inner = cells[inside[0]].cell_contents
    kept = (cells[: inside[0]], cells[inside[0] + 1 :], forward.__defaults__, forward.__kwdefaults__)
    if _reaches((*kept, *(each for each in vars(forward).values() if each is not inner)), inner):
        raise ValueError("its forward is wrapped by a decorator that keeps it in several places")
    new = make(inner)
    made = _copied(forward, forward.__code__, (*cells[: inside[0]], CellType(new), *cells[inside[0] + 1 :]))
    made.__dict__.update({key: new for key, each in vars(forward).items() if each is inner})  # `__wrapped__`
    return made


def _drop(known: dict[str, Any], unique: str, _before: CodeType) -> None:
    known.pop(unique, None)


def _uses(code: CodeType, name: str) -> list[str]:
    """Return the instructions of a piece of code, and of the functions in it, that use a name."""
    found = []
    if name in code.co_names:
        found = [
            each.opname for each in dis.get_instructions(code) if each.opcode in dis.hasname and each.argval == name
        ]
    for inner in code.co_consts:
        found += _uses(inner, name) if isinstance(inner, CodeType) else []
    return found


def _renamed(code: CodeType, name: str, unique: str) -> CodeType:
    return code.replace(
        co_names=tuple(unique if each == name else each for each in code.co_names),
        co_consts=tuple(
            _renamed(each, name, unique) if isinstance(each, CodeType) else each for each in code.co_consts
        ),
    )


def _copied(function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    made.__dict__.clear()
    made.__dict__.update(vars(function))  # without a `__wrapped__` that the function has not
    made.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
    return made


def _contents(function: FunctionType) -> Iterator[object]:
    """Yield the contents of the variables of a closure; None for those that are empty yet."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield None


def _reaches(values: Iterable[object], wanted: object) -> bool:
    """Whether an object is among values, or in what they hold; also where they hold too much to tell."""
    seen = set[int]()
    waiting: list[Any] = list(values)
    while waiting:
        value = waiting.pop()
        if value is wanted or len(seen) > _AT_MOST:
            return True
        if id(value) in seen or isinstance(value, (ModuleType, type, Tensor)):
            continue
        seen.add(id(value))
        held = gc.get_referents(value)
        if isinstance(value, FunctionType):
            held = [each for each in held if each is not value.__globals__]
        waiting += held
    return False
