"""Pieces of source for generated functions that take what a layer's forward takes, and pass it on."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .layer import Layer

Forward = Callable[..., Any]

_TAKEN = ("_name", "_records", "_error", "_index")
"""Local names of generated functions, besides those that start with `_kernel`."""

_PACKED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Source:
    """The parameters of a layer's reference, as source.

    Attributes:
        is_flat: Whether `inner_call` differs from `call`: what is called with it is made by `flattened`.
    """

    def __init__(self, layer: Layer) -> None:
        """Read the parameters; where they cannot be read, or passed on by name, all are packed."""
        self._is_function = layer.is_function
        self._parameters = _parameters(layer.reference)
        kinds = {parameter.kind for parameter in self._parameters or ()}
        self.is_flat = inspect.Parameter.KEYWORD_ONLY in kinds and not kinds.intersection(_PACKED)

    @cached_property
    def signature(self) -> str:
        """What follows the name of a function that takes them, without annotations and defaults."""
        if self._parameters is None:
            return "(*args, **kwargs)"
        bare = [
            p.replace(annotation=p.empty, default=None if p.default is not p.empty else p.empty)
            for p in self._parameters
        ]
        return str(inspect.Signature(bare))

    @cached_property
    def call(self) -> str:
        """What stands in a call that passes them on, keywords as keywords."""
        if self._parameters is None:
            return "*args, **kwargs"
        form: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*{0}",
            inspect.Parameter.VAR_KEYWORD: "**{0}",
            inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
        }
        return ", ".join(form.get(p.kind, "{0}").format(p.name) for p in self._parameters)

    @cached_property
    def inner_call(self) -> str:
        """The same inside of an eager forward: keywords as positions, where nothing is packed; a third quicker."""
        return ", ".join(p.name for p in self._parameters or ()) if self.is_flat else self.call

    @cached_property
    def module(self) -> str:
        """The module, `None` for a function."""
        if self._is_function:
            return "None"
        if self._parameters is None:
            return "args[0]"
        return self._parameters[0].name + ("[0]" if self._self_is_packed else "")

    @cached_property
    def values(self) -> str:
        """A tuple of all arguments, without the module, in the order of the signature."""
        if self._parameters is None:
            return "(*args, *kwargs.values())" if self._is_function else "(*args[1:], *kwargs.values())"
        form: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*{0}",
            inspect.Parameter.VAR_KEYWORD: "*{0}.values()",
        }
        if self._self_is_packed:
            form[inspect.Parameter.VAR_POSITIONAL] = "*{0}[1:]"
        inside = "".join(form.get(p.kind, "{0}").format(p.name) + ", " for p in self._arguments)
        return f"({inside})"

    @cached_property
    def first(self) -> str | None:
        """The first argument, which is mostly the tensor that says where the call is; None without one."""
        if self._parameters is None:
            return "args[0]" if self._is_function else "args[1]"
        for parameter in self._arguments:
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{int(self._self_is_packed)}]"
            return None if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        return None

    def give_defaults(self, function: Forward) -> None:
        """Give a function with `signature` the defaults of the reference."""
        if self._parameters is None:
            return
        given = [p for p in self._parameters if p.default is not p.empty]
        function.__defaults__ = tuple(p.default for p in given if p.kind is not p.KEYWORD_ONLY)
        function.__kwdefaults__ = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}

    def flattened(self, function: Forward) -> Forward | None:
        """Return a function of the same code that is called with `inner_call`; None if there cannot be one."""
        if type(function) is not types.FunctionType:
            return None
        code, names = function.__code__, tuple(p.name for p in self._parameters or ())
        count = code.co_argcount + code.co_kwonlyargcount
        keywords = code.co_varnames[code.co_argcount : count]
        packed = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        if packed or count != len(names) or keywords != names[code.co_argcount :]:
            return None
        flat = code.replace(co_argcount=count, co_kwonlyargcount=0)
        return types.FunctionType(flat, function.__globals__, function.__name__, None, function.__closure__)

    @property
    def _arguments(self) -> list[inspect.Parameter]:
        """The parameters that a caller fills: all but `self`."""
        return list(self._parameters or ())[0 if self._self_is_packed or self._is_function else 1 :]

    @property
    def _self_is_packed(self) -> bool:
        """Whether a method takes its `self` as the first of `*args`."""
        if self._is_function or not self._parameters:
            return False
        return self._parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


def _parameters(reference: Forward) -> tuple[inspect.Parameter, ...] | None:
    """Return the parameters that the reference really has, or None where there is nothing to read."""
    try:
        signature = inspect.signature(reference, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    parameters = tuple(signature.parameters.values())
    taken = any(p.name.startswith("_kernel") or p.name in _TAKEN for p in parameters)
    return None if taken else parameters
