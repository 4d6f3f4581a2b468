"""What was decorated: a layer name, a reference forward, and its signature."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        adapted: Kernels that were made to fit this layer alone; they go with it.
    """

    name: str
    qualname: str
    reference: Callable[..., Any]
    is_function: bool
    condition: Callable[..., bool] | None = None
    use_fallback: bool = True
    number: int = field(default_factory=lambda: next(_numbers))
    adapted: dict[int, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Signature of the reference as a caller sees it, without `self`."""
        return call_signature(self.reference, drop_self=not self.is_function)

    def __repr__(self) -> str:
        """Show name and place."""
        return f"<Layer {self.name!r} at {self.qualname}>"


def call_signature(function: Callable[..., Any], *, drop_self: bool) -> inspect.Signature:
    """Return the signature of `function`, without its first parameter if that is `self`."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    starts_with_self = parameters and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    return signature.replace(parameters=parameters[1:] if drop_self and starts_with_self else parameters)
