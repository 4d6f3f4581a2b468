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
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch

from ..layer import Forward, Layer
from ..nested import held_by
from ..resolution import KernelLayer
from ..torch_internals import constant_result, dtensor_parts, is_watched, tree_map
from .crossing import Back, from_local, joined, recorded, shards_of, strides_of, whole_maker
from .limits import unlimited
from .tensors import LOCAL, is_distributed

Cut = tuple["int | None", ...]
"""The dimension of a call, from the end, that each dimension of the mesh shards; None where all ranks hold the same."""
MOST_PLANS = 1024
"""A kernel that gets more kinds of calls starts again, as with none."""
Look = tuple[str, Any, Any, torch.Size, Any, torch.dtype]
"""Name, mesh, placements, shape, strides and dtype of a distributed tensor of a call."""


class Plan(NamedTuple):
    """The plan of all calls whose distributed tensors have the same meshes, placements, shapes, strides and dtypes."""

    problem: str
    """Why the kernel cannot run on shards; or an empty text."""
    cut: Cut = ()
    shared: tuple[Any, ...] = ()
    """How gradients of tensors are placed that all ranks hold."""
    backs: tuple[tuple[int, Back], ...] = ()
    """Of each tensor, with its number among arguments and parameters."""
    outputs: Any = None
    """Placements and makers of outputs, by shape, strides and dtype on this rank; None in calls that are watched."""


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
    if key in layer.adapted:  # the same function each time: code that was compiled with it stays valid
        return cast(Forward, layer.adapted[key][1])
    from torch.distributed.tensor import Replicate, Shard  # a second; a call with a `DTensor` has done it

    whole: tuple[int, ...] = getattr(kernel, LOCAL)
    even = getattr(kernel, "supports", None) is not None or unlimited(forward) is not forward
    names, is_method = tuple(layer.signature.parameters), not layer.is_function

    @constant_result  # in compiled code, at trace time: the reason is for the decision that follows
    def note(problem: str) -> None:
        sharded.__dict__["kernels_misplaced"] = f"it runs on shards of DTensors ({LOCAL} = {whole}), and {problem}"

    def placed(leaf: Any, plan: Plan, given: Iterable[Any], inputs: Iterable[Any], incoming: list[Any]) -> Any:
        """Return an output as the distributed tensor of which it is this rank's shard."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        look = (leaf.shape, leaf.stride(), leaf.dtype)
        if plan.outputs is not None and (known := plan.outputs.get(look)) is not None:
            return joined(leaf, known, incoming)
        cut, mesh = plan.cut, plan.backs[0][1].mesh
        places = tuple([Replicate() if dim is None else Shard(dim + leaf.ndim) for dim in cut])
        tensors: Any = [value for value in given if isinstance(value, torch.Tensor)]
        shards = [value for value in inputs if isinstance(value, torch.Tensor)]
        for tensor, shard in zip(tensors, shards, strict=True):
            if leaf.shape == shard.shape and leaf.stride() == shard.stride() and tensor.placements == places:
                shape, stride = tensor.shape, tensor.stride()  # not computed: Dynamo would lose symbols of sizes
                break
        else:
            sizes = list(leaf.shape)
            for dim in {dim for dim in cut if dim is not None}:
                number = next(n for n, t in enumerate(tensors) if not t.placements[cut.index(dim)].is_replicate())
                size, held = tensors[number].shape[dim], shards[number].shape[dim]
                if leaf.ndim < -dim or leaf.shape[dim] != held:
                    raise ValueError(
                        f"The kernel returned a tensor of shape {tuple(leaf.shape)} for a shard that has {held} of "
                        f"{size} positions in dimension {dim}: it is not local over that, as its {LOCAL} = {whole} "
                        "declares."
                    )
                sizes[dim] = size
            shape = torch.Size(sizes)
            stride = strides_of(leaf, shape, cut)
        if plan.outputs is None:
            return from_local(leaf, mesh, places, shape, stride)
        plan.outputs[look] = known = places, whole_maker(mesh, places, shape, stride)
        return joined(leaf, known, incoming)

    plans: dict[Any, Plan] = {}

    @functools.wraps(forward, updated=())
    def sharded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if is_method else args
        if is_method and args[0]._modules and (problem := _hooked(args[0])):
            note(problem)
            return NotImplemented
        values = [*given, *kwargs.values(), *(_parameters(args[0]) if is_method else ())]
        fast = not is_watched()
        held, looks = zip(*map(_parts, values), strict=True) if fast and values else (values, ())
        key = looks, *kwargs
        plan = plans.get(key) if fast else None
        if plan is None:
            more = [f"argument {number + 1}" for number in range(len(names), len(given))]
            named = [*zip((*names, *more), given, strict=False), *kwargs.items()]
            plan = _plan(_looks(named), args[0] if is_method else None, values, whole, even, fast)
            if fast:
                if len(plans) >= MOST_PLANS:
                    plans.clear()
                plans[key] = plan
        if plan.problem:
            note(plan.problem)
            return NotImplemented
        incoming: list[Any] = []
        shards = shards_of(values, held, plan.backs, incoming)
        inputs, rest = shards[: len(given)], shards[len(given) :]
        if kwargs:
            kwargs, rest = dict(zip(kwargs, rest, strict=False)), rest[len(kwargs) :]
        module = (_of_shards(args[0], iter(rest), plan.shared),) if is_method else ()
        output = forward(*module, *inputs, **kwargs)
        if isinstance(output, torch.Tensor):
            return placed(output, plan, values, shards, incoming)
        if output is NotImplemented:
            return output
        return tree_map(lambda leaf: placed(leaf, plan, values, shards, incoming), output)

    look = getattr(forward, "kernels_changed_part", None)
    if look is not None:  # it takes only plain parameters for such

        def changed_part(module: torch.nn.Module) -> Any:
            shards = (recorded(t, None) if is_distributed(type(t)) else t for t in _parameters(module))
            return look(_of_shards(module, shards, None))

        sharded.__dict__["kernels_changed_part"] = changed_part
    sharded.__dict__["kernels_unlimited"] = unlimited(forward)
    return cast(Forward, layer.adapted.setdefault(key, (forward, sharded))[1])


def misplaced(implementation: object) -> str:
    """Return why a local kernel has last passed on a call with distributed tensors; empty if it never has."""
    return getattr(implementation, "kernels_misplaced", "")


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the shard of a distributed tensor, and how that looks; another value, and why it does not fit, or ""."""
    try:
        return dtensor_parts(value)
    except AttributeError:
        return value, _misfit(value)


def _misfit(value: Any) -> str:
    """Return why a kernel cannot run on shards with a value beside distributed tensors, or ""."""
    if isinstance(value, torch.Tensor):
        return "is a plain tensor"
    return f"holds tensors in a {type(value).__name__}" if held_by((value,))[0] else ""


def _looks(named: Iterable[tuple[str, Any]]) -> tuple[Look, ...] | str:
    """Return how the distributed tensors of a call look; or which argument holds another tensor."""
    found: list[Look] = []
    for name, value in named:
        if is_distributed(type(value)):
            found.append((name, value.device_mesh, value.placements, value.shape, value.stride(), value.dtype))
        elif misfit := _misfit(value):
            return f"{name} {misfit}"
    return tuple(found) or "no argument is a DTensor"


def _plan(
    looks: tuple[Look, ...] | str, module: Any, values: list[Any], whole: tuple[int, ...], even: bool, fast: bool
) -> Plan:
    """Return the plan of such calls, which each rank makes alike."""
    from torch.distributed.tensor import Partial, Replicate

    cut, problem = ((), looks) if isinstance(looks, str) else _cut(looks, whole, even)
    if problem := problem or (_not_whole(module, looks[0][1]) if module is not None else ""):
        return Plan(problem)
    shared = tuple([Replicate() if dim is None else Partial() for dim in cut])
    backs = []
    for number, value in enumerate(values):
        if is_distributed(type(value)):
            pairs = zip(value.placements, shared, strict=True)
            places = tuple([theirs if ours.is_replicate() else ours for ours, theirs in pairs])
            of = value.device_mesh, places, value.shape, value.stride()
            backs.append((number, Back(*of, whole_maker(*of) if fast else None)))
    return Plan("", cut, shared, tuple(backs), {} if fast else None)


def _cut(looks: tuple[Look, ...], whole: tuple[int, ...], even: bool) -> tuple[Cut, str]:
    """Return the dimension that each dimension of the mesh shards; and why the kernel cannot run on shards, or ""."""
    (first, mesh, *_), *others = looks
    for name, theirs, *_ in others:
        if theirs != mesh:
            return (), f"{name} is on another mesh than {first}"
    cut: list[int | None] = []
    sizes: dict[int, int] = {}
    for number in range(mesh.ndim):
        dim, by, size = None, "", 0
        for name, _, placements, shape, *_ in looks:
            placement = placements[number]
            if type(placement).__name__ == "Shard":
                this = _from_end(placement, len(shape))
                if dim is not None and (this != dim or shape[this] != size):
                    return (), f"{name} is not sharded as {by} is"
                dim, by, size = this, name, shape[this]
            elif not placement.is_replicate():
                return (), f"{name} is {placement}"
        if dim in whole:
            return (), f"{by} is sharded over dimension {dim}"
        for name, _, placements, shape, *_ in looks:
            held = dim is not None and len(shape) >= -dim and shape[dim] != 1
            if held and placements[number].is_replicate():
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
    """Return the parameter of a module that not all ranks of a mesh hold whole; or ""."""
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
        if child is not None and (problem := _not_whole(child, mesh)):
            return f"{problem} of {name}"
    return ""


def _hooked(module: torch.nn.Module) -> str:
    """Return the child of a module that has hooks, as of tensor parallelism: they make distributed tensors; or ""."""
    for name, child in module._modules.items():
        if child is not None and (child._forward_hooks or child._forward_pre_hooks):
            return f"{name} has hooks"
        if child is not None and (problem := _hooked(child)):
            return f"{problem} of {name}"
    return ""


def _parameters(module: torch.nn.Module) -> list[Any]:
    """Return the parameters of a module and its children, also those that are None or that others are, too."""
    found: list[Any] = [*module._parameters.values()]
    for child in module._modules.values():
        if child is not None:
            found += _parameters(child)
    return found


def _of_shards(module: torch.nn.Module, shards: Iterator[Any], shared: tuple[Any, ...] | None) -> torch.nn.Module:
    """Return a module with shards in place of its parameters, those of its buffers, and all else as in the original."""
    made = object.__new__(type(module))  # a class may have a constructor
    state = made.__dict__
    state.update(module.__dict__)
    state["_parameters"] = {name: next(shards) for name in module._parameters}
    state["_buffers"] = {
        name: recorded(held, shared) if is_distributed(type(held)) else held for name, held in module._buffers.items()
    }
    state["_modules"] = {
        name: None if child is None else _of_shards(child, shards, shared) for name, child in module._modules.items()
    }
    return made
