"""Tensors that are not plain: of subclasses, whose memory is elsewhere, pending, or means something else.

A kernel that takes the address of a `DTensor` finds none. So only plain tensors reach a kernel that does not declare
which subclasses it accepts, and a pending collective is waited for first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from ..layer import Forward
from ..nested import SEQUENCES, SIMPLE, held_by
from ..torch_internals import constant_result, is_fake_class, tree_leaves, tree_map

DECLARATION = "tensor_subclasses"
"""The attribute in which a kernel declares the subclasses of `torch.Tensor` that it accepts."""

LOCAL = "local_except"
"""The attribute in which a kernel declares the dimensions, from the end, that it needs whole: it is local over others.

`guards.shards` runs it on shards then."""

_USUAL = (torch.Tensor, torch.nn.Parameter)
_HOLD_THEIR_DATA = ("torchao.", "torch.ao.", "torch.sparse.")
"""Where the subclasses are defined that any kernel gets: quantized numbers that their operators know."""

odd_parameters: list[str] = []
"""The first class of a parameter or buffer that kernels must not get unasked; empty until the process has one."""
on_odd_parameter: list[Callable[[], None]] = []
"""Called then: from now on, calls look at the parameters and buffers of their module."""


def is_odd(values: Iterable[Any]) -> bool:
    """Whether an argument, or a value in one, is a tensor that is not plain."""
    for value in values:
        kind = type(value)
        inside = value if kind in SEQUENCES else value.values() if kind is dict else (value,)
        if not SIMPLE.issuperset(map(type, inside)):
            return bool(_kinds(values))
    return False


def is_odd_traced(values: Iterable[Any]) -> bool:
    """Do the same where Dynamo traces."""
    return bool(_kinds(values))


def is_odd_module(module: torch.nn.Module) -> bool:
    """Whether a module or a child has a parameter or buffer that kernels must not get unasked."""
    for held in module._parameters, module._buffers:
        for tensor in held.values():
            if tensor is not None and type(tensor) not in _USUAL and _is_odd_parameter(type(tensor)):
                return True
    return any(child is not None and is_odd_module(child) for child in module._modules.values())


def odd_classes(module: torch.nn.Module | None, values: Iterable[Any]) -> frozenset[type[torch.Tensor]]:
    """Return the subclasses among the arguments of a call, and those of the parameters and buffers of its module."""
    kinds = [] if SIMPLE.issuperset(map(type, values)) else _kinds(values)
    if module is not None and module._buffers:
        _notice(module._buffers.values())
    return frozenset(kinds + (_kinds_of(module) if odd_parameters else []))


def subclasses_traced(module: torch.nn.Module | None, values: Iterable[Any]) -> tuple[type[torch.Tensor], ...]:
    """Return the same while a call is traced, when fake tensors replace plain ones; Dynamo follows this function."""
    kinds = _kinds(values)
    if _looks_at_parameters():
        kinds += _kinds_of(module)
    return tuple([kind for kind in kinds if not is_fake_class(kind)])


@constant_result
def _looks_at_parameters() -> bool:
    """Run at trace time: the classes of parameters are guarded anyway, so this needs no guard."""
    return bool(odd_parameters)


def _kinds(values: Iterable[Any]) -> list[type[torch.Tensor]]:
    found: list[type[torch.Tensor]] = []
    # Warm calls would pay 20 us for all that a cache holds; traced ones would compile anew whenever it grows.
    tensors, _, _ = held_by(values, attributes=False)
    for tensor in tensors:
        kind = type(tensor)
        if kind not in _USUAL and kind not in found and not kind.__module__.startswith(_HOLD_THEIR_DATA):
            found.append(kind)
    return found


def _kinds_of(module: torch.nn.Module | None) -> list[type[torch.Tensor]]:
    if module is None:
        return []
    held: list[torch.Tensor | None] = [*module._parameters.values(), *module._buffers.values()]
    kinds = [type(tensor) for tensor in held if tensor is not None and _is_odd_parameter(type(tensor))]
    return sum(map(_kinds_of, module._modules.values()), kinds)  # `parameters()` takes microseconds


def _is_odd_parameter(kind: type[torch.Tensor]) -> bool:
    """Whether parameters of a class have no memory of their own: not so for those that only add state to a tensor."""
    if kind in _USUAL or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:  # operators see plain memory then
        return False
    return not kind.__module__.startswith(_HOLD_THEIR_DATA) and not is_fake_class(kind)


def check_tensors(classes: Iterable[type[torch.Tensor]], kernel: object) -> str | None:
    """Return why a kernel layer does not serve calls with tensors of these classes, or None."""
    accepted, shards = getattr(kernel, DECLARATION, ()), getattr(kernel, LOCAL, None) is not None
    refused = (kind for kind in classes if not (issubclass(kind, accepted) or (shards and is_distributed(kind))))
    names = sorted(kind.__qualname__ for kind in refused)
    if not names:
        return None
    return (
        f"an argument, parameter or buffer of this call is a {' and a '.join(names)}, and the kernel does not declare "
        f"that it accepts them ({DECLARATION}): the memory of such a tensor may not be that of a plain one"
    )


# --- Pending collectives -----------------------------------------------------------------------------


def is_distributed(kind: type[Any]) -> bool:
    """Whether a class is `DTensor`: only that has placements, and to import its module takes long."""
    return hasattr(kind, "placements")


def is_pending(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of a class are results of functional collectives that may not have arrived yet."""
    return hasattr(kind, "trigger_wait")  # only `AsyncCollectiveTensor` has it; to import its module takes long


def pending_among(odd: Iterable[type[torch.Tensor]], values: Iterable[Any]) -> frozenset[type[torch.Tensor]]:
    """Return the classes of pending collectives; none where one is in an object that cannot be made anew with it."""
    pending = frozenset(filter(is_pending, odd))
    if not pending:
        return pending
    others = [leaf for leaf in tree_leaves(list(values)) if not isinstance(leaf, torch.Tensor)]
    hidden, _, _ = held_by(others, attributes=False)
    return frozenset() if any(is_pending(type(tensor)) for tensor in hidden) else pending


def waiting(forward: Forward) -> Forward:
    """Return a function that waits for the pending collectives among its arguments; gradients flow through."""

    def waited(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(arrived, (args, kwargs))
        return forward(*args, **kwargs)

    return waited


def arrived(leaf: Any) -> Any:
    """Return a value; of a pending collective, its result."""
    return cast(Any, _Wait).apply(leaf) if is_pending(type(leaf)) else leaf


class _Wait(torch.autograd.Function):
    """The result of a collective. To wait by itself leaves the graph: the inner tensor has no history."""

    @staticmethod
    def forward(ctx: Any, pending: torch.Tensor) -> torch.Tensor:
        """Wait. The view keeps autograd from writing a history on the tensor that the pending one shares."""
        result: torch.Tensor = cast(Any, pending).trigger_wait()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return gradient


# --- Parameters and buffers --------------------------------------------------------------------------


def _notice(tensors: Iterable[torch.Tensor | None]) -> None:
    """Notice the first tensor of a module that is not plain: until then, no call pays for looking at any."""
    if odd_parameters:
        return
    for tensor in tensors:
        if tensor is not None and _is_odd_parameter(type(tensor)):
            odd_parameters.append(type(tensor).__qualname__)
            for listener in on_odd_parameter:
                listener()
            return


def _registered(module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    _notice((tensor,))


# Public; those put into a dict by hand pass. So `distribute_module` puts buffers there: a decision looks at these.
torch.nn.modules.module.register_module_parameter_registration_hook(_registered)
torch.nn.modules.module.register_module_buffer_registration_hook(_registered)
