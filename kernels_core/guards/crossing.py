"""The way of tensors into a kernel that runs on shards, and out of it: two nodes of autograd for a call.

PyTorch's own way, `DTensor.to_local` and `DTensor.from_local`, is a node for each tensor, and finds out each time how
that is placed. Tracers, and gradients of gradients, take that way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch

from ..torch_internals import dtensor_parts, is_watched
from .tensors import arrived, is_pending


class Back(NamedTuple):
    """How the gradient of a tensor is placed."""

    mesh: Any
    places: Any
    shape: torch.Size
    stride: tuple[int, ...]
    whole_of: Callable[[torch.Tensor], Any] | None
    """Makes a gradient with the strides of its tensor distributed; None in calls that are watched."""


def shards_of(
    values: list[Any], held: Sequence[Any], backs: tuple[tuple[int, Back], ...], incoming: list[Any]
) -> list[Any]:
    """Return the values of a call with this rank's shards in place of distributed tensors.

    Args:
        values: The values.
        held: The shards of distributed tensors among them, without a history.
        backs: How gradients of these are placed, with the number of each.
        incoming: Is to get the gradients that `joined` passes on.
    """
    found, learning, records = values.copy(), [], torch.is_grad_enabled()
    for each in backs:
        number, back = each
        if back.whole_of is None:
            found[number] = recorded(values[number], back.places)
        elif records and values[number].requires_grad:
            learning.append(each)
        else:
            found[number] = _arrived(held[number])
    if learning:
        numbers = [number for number, _ in learning]
        own = [_arrived(held[number]) for number in numbers]
        shards = _split(own, [back for _, back in learning], incoming, *[values[number] for number in numbers])
        for number, shard in zip(numbers, shards, strict=True):
            found[number] = shard
    return found


def recorded(tensor: Any, places: tuple[Any, ...] | None) -> Any:
    """Return the shard of a distributed tensor as tracers know the way to it."""
    return arrived(tensor.to_local(grad_placements=places))


def _arrived(shard: Any) -> Any:
    """Return a shard without a history; of a pending collective, its result."""
    return shard.trigger_wait() if type(shard) is not torch.Tensor and is_pending(type(shard)) else shard


def joined(shard: torch.Tensor, known: tuple[Any, Callable[[torch.Tensor], Any]], incoming: list[Any]) -> Any:
    """Return the distributed tensor of which each rank has a shard."""
    if shard.requires_grad and torch.is_grad_enabled():
        return _join(shard, known, incoming)
    return known[1](shard)


def from_local(shard: torch.Tensor, mesh: Any, places: Any, shape: torch.Size, stride: tuple[int, ...]) -> Any:
    """Do the same as tracers know it, and so that gradients of gradients can follow."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, mesh, places, run_check=False, shape=shape, stride=stride)


def whole_maker(mesh: Any, places: Any, shape: torch.Size, stride: Any) -> Callable[[torch.Tensor], Any]:
    """Return a function that makes the shard of each rank a distributed tensor, without a history."""
    from torch.distributed.tensor import DTensor

    new: Any = DTensor.__new__  # its `__init__` does nothing
    look: Any = ()

    def whole_of(shard: torch.Tensor) -> Any:
        nonlocal look
        if type(look) is not tuple:
            return new(DTensor, shard.detach(), look, requires_grad=False)
        whole = from_local(shard.detach(), mesh, places, shape, stride)
        _, look = dtensor_parts(whole)  # what the constructor takes; else a tuple
        return whole

    return whole_of


class _Split(torch.autograd.Function):
    """As `DTensor.to_local` of all tensors of a call: but how gradients are placed is known before."""

    @staticmethod
    def forward(ctx: Any, shards: list[torch.Tensor], backs: list[Back], incoming: list[Any], *tensors: Any) -> Any:
        """Return the shards; fresh tensors, for autograd writes its history on them."""
        ctx.set_materialize_grads(False)
        ctx.strides, ctx.backs, ctx.incoming = [shard.stride() for shard in shards], backs, incoming
        return tuple([shard.view_as(shard) for shard in shards])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """Place the gradients."""
        fast = not torch.is_grad_enabled() and not is_watched()
        # One for all that get the same gradient: autograd copies what others have, too, before it adds to it in place.
        known: dict[int, Any] = {}
        for reference in ctx.incoming:
            if (whole := reference()) is not None:
                known[id(dtensor_parts(whole)[0])] = whole
        ctx.incoming.clear()
        placed: list[Any] = [None, None, None]
        for gradient, own, back in zip(gradients, ctx.strides, ctx.backs, strict=True):
            mesh, places, shape, stride, whole_of = back
            if gradient is None:
                whole = None
            elif gradient.stride() != own or not fast:
                if gradient.stride() != own:
                    dims = [place.dim - len(shape) if hasattr(place, "dim") else None for place in places]
                    stride = strides_of(gradient, shape, dims)
                whole = from_local(gradient, mesh, places, shape, stride)
            elif (whole := known.get(id(gradient))) is None:
                whole = known[id(gradient)] = whole_of(gradient)
            elif whole.placements != places or whole.shape != shape:
                whole = whole_of(gradient.clone())
            placed.append(whole)
        return tuple(placed)


class _Join(torch.autograd.Function):
    """As `DTensor.from_local`: but how the tensor is placed is known before."""

    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, known: tuple[Any, Callable[[torch.Tensor], Any]], incoming: list[Any]
    ) -> Any:
        """Return the distributed tensor."""
        ctx.set_materialize_grads(False)
        ctx.places, whole_of = known
        ctx.incoming = incoming
        return whole_of(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        """Return the shard of the gradient, placed as the output is."""
        if gradient is not None:
            if gradient.placements != ctx.places:
                gradient = gradient.redistribute(placements=ctx.places)
            ctx.incoming.append(weakref.ref(gradient))
            gradient = arrived(gradient.to_local())
        return gradient, None, None


# `apply` itself: PyTorch's function of that name first searches the arguments for tensors of transforms.
_split, _join = (cast(Any, super(torch.autograd.Function, each)).apply for each in (_Split, _Join))


def strides_of(shard: torch.Tensor, shape: torch.Size, cut: Iterable[int | None]) -> tuple[int, ...]:
    """Return the strides of a tensor of which one like this is a shard."""
    strides = shard.stride()
    for dim in {dim for dim in cut if dim is not None}:
        size, held, own = shape[dim], shard.shape[dim], strides[dim]
        if own:  # else it is expanded, and adds nothing to the others
            outer = [s > own or (s == own and held == 1 and n != dim + len(strides)) for n, s in enumerate(strides)]
            strides = tuple([s // held * size if is_outer else s for s, is_outer in zip(strides, outer, strict=True)])
    return strides
