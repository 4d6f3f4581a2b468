"""Make a class or function dispatch: the decorators that library authors use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from .dispatch import make_forward
from .errors import ArgumentError, ArgumentTypeError, require_type
from .generated import dispatched_layer
from .layer import Layer

T = TypeVar("T", bound=Callable[..., Any])
M = TypeVar("M", bound=type[torch.nn.Module])


def use_kernel_forward_from_hub(
    layer_name: str, condition: Callable[..., bool] | None = None, *, use_fallback: bool = True
) -> Callable[[T], T]:
    """Let kernels that are offered for `layer_name` serve the decorated class or function.

    Where none is offered, fits, or can be used, the decorated forward itself runs: the *reference*.

    Args:
        layer_name: The name under which mappings and plugins offer kernels.
        condition: Called per module at each call (for a function: with its arguments); where it
            returns False, the reference runs.
        use_fallback: With False, a call that no kernel serves raises `NoKernelError` instead of
            running the reference.

    Returns:
        A decorator that changes the class in place, or returns the dispatching function.

    Raises:
        ArgumentError: If the layer name is empty.
        ArgumentTypeError: If applied to anything but an `nn.Module` class or a function, or the condition
            cannot be called.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(torch.nn.Module):
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return x
        >>> Identity()(torch.ones(1))
        tensor([1.])
        >>> @use_kernel_forward_from_hub("double")
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return x + x
        >>> double(torch.ones(1))
        tensor([2.])
    """
    _check(layer_name, condition, use_fallback)

    def decorate(target: T) -> T:
        if isinstance(target, type):
            replace_kernel_forward_from_hub(cast(Any, target), layer_name, condition, use_fallback=use_fallback)
            return target
        if not inspect.isfunction(target) and not inspect.isbuiltin(target):
            raise ArgumentTypeError(
                f"@use_kernel_forward_from_hub decorates an nn.Module class or a function, not on {target!r}."
            )
        reference: Any = _reference(target)  # or a second decorator would dispatch twice
        qualname = f"{reference.__module__}.{reference.__qualname__}"
        forward: Any = make_forward(Layer(layer_name, qualname, reference, True, condition, use_fallback))
        forward.kernel_layer_name = layer_name
        return cast(T, forward)

    return decorate


def replace_kernel_forward_from_hub(
    cls: type[torch.nn.Module],
    layer_name: str,
    condition: Callable[..., bool] | None = None,
    *,
    use_fallback: bool = True,
) -> None:
    """Decorate a class that another package defines, as `use_kernel_forward_from_hub` decorates one's own.

    A class that is decorated already gets the new name, condition and fallback; its reference stays.

    Args:
        cls: The `nn.Module` class to change in place.
        layer_name: As for `use_kernel_forward_from_hub`, as are the others.
        condition: See there.
        use_fallback: See there.

    Raises:
        ArgumentError: If the layer name is empty.
        ArgumentTypeError: If `cls` is not an `nn.Module` class with a forward that takes `self`, or the
            condition cannot be called.

    Example:
        >>> class Theirs(torch.nn.Module):
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return x
        >>> replace_kernel_forward_from_hub(Theirs, "Identity")
        >>> Theirs()(torch.ones(1))
        tensor([1.])
    """
    _check(layer_name, condition, use_fallback)
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        raise ArgumentTypeError(f"{cls!r} is not an nn.Module class, so it has no forward to dispatch.")
    if cls.forward is torch.nn.Module.forward:
        raise ArgumentTypeError(f"{cls.__qualname__} has no forward, so there is no reference to fall back to.")
    # Read without binding: `cls.forward` of a static method looks like a function that takes the module.
    stated = inspect.getattr_static(cls, "forward")
    if isinstance(stated, staticmethod | classmethod) or not hasattr(stated, "__get__"):  # an object is never bound
        kind = "a static or class method" if hasattr(stated, "__get__") else f"{stated!r}, which never gets the module"
        raise ArgumentTypeError(
            f"{cls.__qualname__}.forward is {kind}: kernels run on the module, so make it take self."
        )
    changeable = cast(Any, cls)
    qualname = f"{cls.__module__}.{cls.__qualname__}"
    changeable.forward = make_forward(
        Layer(layer_name, qualname, _reference(cls.forward), False, condition, use_fallback)
    )
    changeable.kernel_layer_name = layer_name


def _check(layer_name: object, condition: object, use_fallback: object) -> None:
    if not isinstance(layer_name, str):
        raise ArgumentTypeError(
            f"The layer name is a string, not {layer_name!r}: write @use_kernel_forward_from_hub('Name')."
        )
    if not layer_name:
        raise ArgumentError("The layer name is empty: mappings need a name to offer kernels under.")
    if condition is not None and not callable(condition):
        raise ArgumentTypeError(f"condition is a function that returns whether kernels may serve, not {condition!r}.")
    require_type(use_fallback, bool, "use_fallback")


def _reference(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward as it was before any decorator of ours."""
    layer = dispatched_layer(forward)
    return layer.reference if layer is not None else forward
