"""`Layer`: a decorated class or function, its layer name, its reference forward and its signature."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ArgumentTypeError

Forward = Callable[..., Any]
"""A function that serves calls of a layer; for a class, it takes the module first."""

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Layer:
    """A decorated class or function, as plugins see it.

    Attributes:
        name: Layer name, the key of mappings.
        qualname: Where it is defined, for messages.
        reference: The undecorated forward (for a class, a function that takes `self` first).
        is_function: Whether a plain function was decorated rather than a class.
        condition: Decides per module whether kernels may serve it; for a function it is
            called with the function's own arguments.
        use_fallback: Whether the reference may run when no kernel serves.
        number: Unique in this process.
        adapted: Kernels that were adapted to this layer; they are dropped with it.
    """

    name: str
    qualname: str
    reference: Forward
    is_function: bool
    condition: Callable[..., bool] | None = None
    use_fallback: bool = True
    number: int = field(default_factory=lambda: next(_numbers))
    adapted: dict[object, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Signature of the reference as a caller sees it, without `self`."""
        return call_signature(self.reference, drop_self=not self.is_function)

    @functools.cached_property
    def kind(self) -> str:
        """The kind of function that the reference is: see `function_kind`."""
        return function_kind(self.reference)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out whatever belongs to this process: a copy is a layer of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("number", "adapted", "signature")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Number a copy anew."""
        vars(self).update(state, number=next(_numbers), adapted={})

    def __repr__(self) -> str:
        """Show name and place."""
        return f"<Layer {self.name!r} at {self.qualname}>"


def find_layer(decorated: object) -> Layer | None:
    """Return the `Layer` of a module, class or function, also of a kernelized module; None if it is not decorated.

    Example:
        >>> find_layer(torch.nn.Linear) is None
        True
    """
    if isinstance(decorated, torch.nn.Module):
        decorated = type(decorated)  # not its own `forward`, which a library may have put there
    if isinstance(decorated, type) and issubclass(decorated, torch.nn.Module):
        # A kernelized class has the layer itself, for its forward may be the kernel.
        decorated = decorated if hasattr(decorated, "kernels_layer") else decorated.forward
    layer = getattr(decorated, "kernels_layer", None)
    return layer if isinstance(layer, Layer) else None


def decorated_layer(decorated: object) -> Layer:
    """Return the `Layer` of a module, class or function, also of a kernelized module.

    Raises:
        ArgumentTypeError: If it is not decorated.

    Example:
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x):
        ...     return x + x
        >>> decorated_layer(double).name
        'double'
    """
    layer = find_layer(decorated)
    if layer is None:
        raise ArgumentTypeError(
            f"{source_label(decorated)} is not decorated: put @use_kernel_forward_from_hub(layer_name) on it, "
            "or call replace_kernel_forward_from_hub(cls, layer_name). A subclass with a forward of its own "
            "runs that forward, and needs its own decorator."
        )
    return layer


def source_label(source: object) -> str:
    """Name a source in one line: a class or function by its place, anything else by its repr."""
    if isinstance(source, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{source.__module__}.{source.__qualname__}"
    if type(source).__repr__ is object.__repr__:  # an address would make each object a new text
        return f"<{type(source).__module__}.{type(source).__qualname__} object>"
    return repr(source)


def function_kind(function: Callable[..., Any]) -> str:
    """Return `"coroutine"`, `"generator"` or `"async generator"` as `inspect` knows it; empty for other functions."""
    if inspect.iscoroutinefunction(function):
        return "coroutine"
    if inspect.isasyncgenfunction(function):
        return "async generator"
    return "generator" if inspect.isgeneratorfunction(function) else ""


def call_signature(function: Callable[..., Any], *, drop_self: bool) -> inspect.Signature:
    """Return the signature of `function`, without its first parameter if that is `self`."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise ArgumentTypeError(f"{source_label(function)} has no signature: write a function around it.") from error
    parameters = list(signature.parameters.values())
    if drop_self and parameters and parameters[0].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD:
        del parameters[0]  # with `*args` first, `self` is one of these
    return signature.replace(parameters=parameters)
