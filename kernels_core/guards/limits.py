"""The calls that a kernel does not take: it returns `NotImplemented` for them, and the next candidate serves.

A decision is for a layer, a device and a mode. Dtypes and shapes differ from call to call, so these are left to a
function around the kernel, and only kernels with such limits pay for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch

from ..layer import Forward, Layer
from ..nested import first_tensor
from ..raised import message_of
from ..resolution import KernelLayer

DECLARATIONS = ("dtypes", "supports")
"""The attributes in which a kernel declares the calls that it takes."""


def first_dtype(values: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype of the first tensor among arguments and in them; None without one."""
    first = first_tensor(values)
    return first.dtype if first is not None else None


def unlimited(function: Forward) -> Forward:
    """Return the kernel within the limit of a candidate: that is at fault or in quarantine, with any limit."""
    return cast(Forward, getattr(function, "kernels_unlimited", function))


def limited(kernel: KernelLayer, forward: Forward) -> Forward:
    """Return a forward that passes on the calls that a kernel declares not to take; the forward itself without any."""
    dtypes, supports = getattr(kernel, "dtypes", None), getattr(kernel, "supports", None)
    if dtypes is None and supports is None:
        return forward
    taken = (None, *dtypes) if dtypes is not None else ()  # None: a call without a tensor

    @functools.wraps(forward)
    def taking(*args: Any, **kwargs: Any) -> Any:
        # Not by the signature: binding arguments would cost more.
        if taken and first_dtype((*args, *kwargs.values())) not in taken:
            return NotImplemented
        if supports is not None and not supports(*args, **kwargs):
            return NotImplemented
        return forward(*args, **kwargs)

    return taking


def check_limits(layer: Layer | None, kernel: KernelLayer) -> str | None:
    """Return the mistake in the limits that a kernel declares, None if there is none."""
    dtypes, supports = getattr(kernel, "dtypes", None), getattr(kernel, "supports", None)
    if dtypes is None and supports is None:
        return None
    if layer is not None and layer.kind:
        return f"it declares dtypes or supports, which a {layer.kind} cannot have: let it return NotImplemented"
    if dtypes is not None and not (
        isinstance(dtypes, (tuple, list, set, frozenset))
        and dtypes
        and all(isinstance(dtype, torch.dtype) for dtype in dtypes)
    ):
        return f"its dtypes are {dtypes!r}: write a tuple of dtypes, such as (torch.float16, torch.bfloat16)"
    if supports is not None:
        forward: Any = cast(Any, kernel).forward if isinstance(kernel, type) else kernel
        try:
            wanted = list(inspect.signature(forward).parameters)
            found = list(inspect.signature(supports).parameters) if callable(supports) else None
        except (TypeError, ValueError) as error:
            return f"the parameters of its supports are not known: {message_of(error)}"
        if found != wanted:
            return f"its supports is {supports!r}: write a function with the parameters of forward, {wanted}"
    return None


def limits_of(kernel: KernelLayer | None) -> str:
    """Return in words the calls that a kernel declares to take; empty if it declares nothing."""
    dtypes, supports = getattr(kernel, "dtypes", None), getattr(kernel, "supports", None)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes or ()))
    only = [f"it takes only {names}"] if names else []
    return "; ".join([*only, *(["it takes only calls for which its supports(...) is true"] if supports else [])])
