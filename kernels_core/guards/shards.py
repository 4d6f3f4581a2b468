"""Calls with distributed tensors: a kernel that is local runs on the shards that each rank holds.

A kernel is *local* over a dimension if its numbers at one position there depend on no other position. Where a `DTensor`
is sharded over such dimensions only, each rank calls the kernel on its own shard, without a collective; the outputs are
sharded as the inputs are. A weight that all ranks hold whole gets a part of its gradient from each shard: that gradient
is `Partial`, as PyTorch's own operators leave it, and whoever reads it adds it up.

Calls are judged by global shapes and placements only, which all ranks know. So all ranks decide alike, and none waits
in a collective of the reference for one that runs the kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, cast

import torch

from ..layer import Forward, Layer
from ..resolution import KernelLayer
from ..torch_internals import constant_result, tree_leaves, tree_map
from .limits import unlimited
from .tensors import LOCAL, arrived, is_distributed

Cut = tuple["int | None", ...]
"""The dimension of a call, from the end, that each dimension of the mesh shards; None where all ranks hold the same."""


def check_local(layer: Layer | None, kernel: KernelLayer) -> str | None:
    """Return the mistake in the dimensions that a kernel declares to need whole, None if there is none."""
    declared: Any = getattr(kernel, LOCAL)
    if not isinstance(declared, tuple) or not all(type(dim) is int and dim < 0 for dim in declared):
        return (
            f"its {LOCAL} is {declared!r}: write a tuple of the dimensions that it needs whole, counted from the end, "
            "such as (-1,), or () if it needs none"
        )
    return f"it declares {LOCAL}, which a {layer.kind} cannot have" if layer is not None and layer.kind else None


def runs_on_shards(classes: Iterable[type[Any]], kernel: object) -> bool:
    """Whether a kernel runs on shards in calls with tensors of these classes."""
    return getattr(kernel, LOCAL, None) is not None and any(map(is_distributed, classes))


def on_shards(layer: Layer, kernel: KernelLayer, forward: Forward) -> Forward:
    """Return a forward that calls a local kernel on the shards of a call, and passes on calls that it does not take.

    Args:
        layer: The layer that the kernel serves.
        kernel: The kernel, which declares the dimensions that it needs whole.
        forward: Its implementation, within its limits: these get shards. Where they may depend on shapes, shards of
            different sizes could get different answers on different ranks, and are not taken.
    """
    key = id(forward), LOCAL
    if key in layer.adapted:
        return cast(Forward, layer.adapted[key][1])
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
    )  # a second; a call with a `DTensor` has done it

    whole: tuple[int, ...] = getattr(kernel, LOCAL)
    even = getattr(kernel, "supports", None) is not None or unlimited(forward) is not forward
    names, is_method = tuple(layer.signature.parameters), not layer.is_function

    @constant_result  # in compiled code, at trace time: the reason is for the decision that follows
    def note(problem: str) -> None:
        sharded.__dict__["kernels_misplaced"] = f"it runs on shards of DTensors ({LOCAL} = {whole}), and {problem}"

    def placed(leaf: Any, mesh: Any, cut: Cut, given: list[tuple[Any, torch.Tensor]]) -> Any:
        """Return an output as the distributed tensor of which it is this rank's shard."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        places = tuple([Replicate() if dim is None else Shard(dim + leaf.ndim) for dim in cut])
        for tensor, shard in given:
            if leaf.shape == shard.shape and leaf.stride() == shard.stride() and tensor.placements == places:
                shape, stride = tensor.shape, tensor.stride()  # not computed: Dynamo would lose symbols of sizes
                return DTensor.from_local(leaf, mesh, places, run_check=False, shape=shape, stride=stride)
        sizes, strides = list(leaf.shape), list(leaf.stride())
        for dim in {dim for dim in cut if dim is not None}:
            tensor, shard = next(pair for pair in given if not pair[0].placements[cut.index(dim)].is_replicate())
            size, held = tensor.shape[dim], shard.shape[dim]
            if leaf.ndim < -dim or leaf.shape[dim] != held:
                raise ValueError(
                    f"The kernel returned a tensor of shape {tuple(leaf.shape)} for a shard that has {held} of {size} "
                    f"positions in dimension {dim}: it is not local over that, as its {LOCAL} = {whole} declares."
                )
            sizes[dim] = size
            strides = [s // held * size if s > leaf.stride(dim) else s for s in strides]
        shape, stride = torch.Size(sizes), tuple(strides)
        return DTensor.from_local(leaf, mesh, places, run_check=False, shape=shape, stride=stride)

    @functools.wraps(forward, updated=())
    def sharded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if is_method else args
        tensors = {names[n] if n < len(names) else f"argument {n + 1}": value for n, value in enumerate(given)}
        tensors = {name: value for name, value in (tensors | kwargs).items() if isinstance(value, _MAY_HOLD)}
        cut, problem = _cut(tensors, whole, even)
        if is_method and not problem:
            problem = _not_whole(args[0], next(iter(tensors.values())).device_mesh)
        if problem:
            note(problem)
            return NotImplemented
        mesh = next(iter(tensors.values())).device_mesh
        shared = [Replicate() if dim is None else Partial() for dim in cut]  # gradients of tensors that all ranks hold
        pairs: list[tuple[Any, torch.Tensor]] = []

        def shard(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            places = cast(Any, value).placements
            back = [theirs if ours.is_replicate() else ours for ours, theirs in zip(places, shared, strict=True)]
            local = arrived(cast(Any, value).to_local(grad_placements=back))
            pairs.append((value, local))
            return local

        shards = [shard(value) for value in given]
        named = {name: shard(value) for name, value in kwargs.items()}
        output = forward(*((_of_shards(args[0], shared),) if is_method else ()), *shards, **named)
        return output if output is NotImplemented else tree_map(lambda leaf: placed(leaf, mesh, cut, pairs), output)

    look = getattr(forward, "kernels_changed_part", None)
    if look is not None:  # it takes only plain parameters for such
        sharded.__dict__["kernels_changed_part"] = lambda module: look(_of_shards(module, None))
    sharded.__dict__["kernels_unlimited"] = unlimited(forward)
    return cast(Forward, layer.adapted.setdefault(key, (forward, sharded))[1])


def misplaced(implementation: object) -> str:
    """Return why a local kernel has last passed on a call with distributed tensors; empty if it never has."""
    return getattr(implementation, "kernels_misplaced", "")


_MAY_HOLD = (torch.Tensor, list, tuple, dict)


def _cut(tensors: dict[str, Any], whole: tuple[int, ...], even: bool) -> tuple[Cut, str]:
    """Return the dimension that each dimension of the mesh shards; and why the kernel cannot run on shards, or ""."""
    for name, tensor in list(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            if not is_distributed(type(tensor)):
                return (), f"{name} is a plain tensor"
        elif any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(tensor)):
            return (), f"{name} holds tensors in a {type(tensor).__name__}"
        else:
            del tensors[name]
    if not tensors:
        return (), "no argument is a DTensor"
    (first, one), *others = tensors.items()
    mesh = one.device_mesh
    for name, tensor in others:
        if tensor.device_mesh != mesh:
            return (), f"{name} is on another mesh than {first}"
    cut: list[int | None] = []
    sizes: dict[int, int] = {}
    for number in range(mesh.ndim):
        dim, by, size = None, "", 0
        for name, tensor in tensors.items():
            placement = tensor.placements[number]
            if type(placement).__name__ == "Shard":
                this = _from_end(placement, tensor.ndim)
                if dim is not None and (this != dim or tensor.shape[this] != size):
                    return (), f"{name} is not sharded as {by} is"
                dim, by, size = this, name, tensor.shape[this]
            elif not placement.is_replicate():
                return (), f"{name} is {placement}"
        if dim in whole:
            return (), f"{by} is sharded over dimension {dim}"
        for name, tensor in tensors.items():
            held = dim is not None and tensor.ndim >= -dim and tensor.shape[dim] != 1
            if held and tensor.placements[number].is_replicate():
                return (), f"{name} is not sharded over dimension {dim} as {by} is"
        cut.append(dim)
        if dim is not None:
            sizes[dim] = size
    for dim, size in sizes.items():
        ranks = _ranks(mesh, cut, dim)
        if size % ranks and (even or cut.count(dim) > 1 or (ranks - 1) * -(-size // ranks) >= size):
            return (), f"dimension {dim} of {size} is not sharded evenly over {ranks} ranks"
    return tuple(cut), ""


def _ranks(mesh: Any, cut: Iterable[int | None], dim: int) -> int:
    """Return over how many ranks a dimension is sharded."""
    return math.prod([mesh.size(number) for number, each in enumerate(cut) if each == dim])


def _from_end(placement: Any, ndim: int) -> int:
    """Return the sharded dimension, from the end, as a constant: Dynamo takes one that changes for a symbol."""
    for dim in range(-ndim, 0):
        if placement.dim == dim + ndim:
            return dim
    return 0


def _not_whole(module: torch.nn.Module, mesh: Any) -> str:
    """Return the parameter of a module that not all ranks of a mesh hold whole, or the child that has hooks; or ""."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if not is_distributed(type(parameter)):
            return f"parameter {name} is a plain tensor"
        if cast(Any, parameter).device_mesh != mesh:
            return f"parameter {name} is on another mesh"
        for placement in cast(Any, parameter).placements:
            if not placement.is_replicate():
                return f"parameter {name} is {placement}"
    for name, child in module._modules.items():
        if child is not None:
            if child._forward_hooks or child._forward_pre_hooks:  # of tensor parallelism: they make DTensors again
                return f"{name} has hooks"
            if problem := _not_whole(child, mesh):
                return f"{problem} of {name}"
    return ""


def _of_shards(module: torch.nn.Module, shared: list[Any] | None) -> torch.nn.Module:
    """Return a module with plain tensors in place of the distributed ones, and all else as in the original."""
    made = object.__new__(type(module))  # a class may have a constructor
    state = dict(module.__dict__)
    for held in ("_parameters", "_buffers"):
        state[held] = {
            name: arrived(tensor.to_local(grad_placements=shared)) if is_distributed(type(tensor)) else tensor
            for name, tensor in state[held].items()
        }
    state["_modules"] = {
        name: None if child is None else _of_shards(child, shared) for name, child in module._modules.items()
    }
    made.__dict__.update(state)
    return made
