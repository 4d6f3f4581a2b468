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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch

from ..layer import Forward, Layer
from ..nested import held_by
from ..resolution import KernelLayer
from ..torch_internals import constant_result, dtensor_spec, is_watched, tree_map
from .limits import unlimited
from .tensors import LOCAL, arrived, is_distributed, is_pending

Cut = tuple["int | None", ...]
"""The dimension of a call, from the end, that each dimension of the mesh shards; None where all ranks hold the same."""
Look = tuple[str, Any, Any, torch.Size, Any, torch.dtype]
"""Name, mesh, placements, shape, strides and dtype of a distributed tensor of a call."""


class Back(NamedTuple):
    """How the gradient of a tensor is placed."""

    mesh: Any
    places: Any
    shape: torch.Size
    stride: tuple[int, ...]
    whole_of: Callable[[torch.Tensor], Any] | None
    """Makes a gradient with the strides of its tensor distributed; None in calls that are watched."""


class Plan(NamedTuple):
    """The plan of all calls whose distributed tensors have the same names, meshes, placements and shapes."""

    problem: str
    """Why the kernel cannot run on shards; or an empty text."""
    cut: Cut = ()
    shared: tuple[Any, ...] = ()
    """How gradients of tensors are placed that all ranks hold."""
    backs: tuple[Back, ...] = ()
    """Of each tensor, in order."""
    outputs: Any = None
    """Placements and specifications of outputs, by their shape, strides and dtype on this rank."""


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

    def placed(leaf: Any, plan: Plan, given: list[Any], shards: list[torch.Tensor], fast: bool) -> Any:
        """Return an output as the distributed tensor of which it is this rank's shard."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        look = (leaf.shape, leaf.stride(), leaf.dtype) if fast else None
        if fast and look in plan.outputs:
            return _joined(leaf, *plan.outputs[look])
        cut = plan.cut
        places = tuple([Replicate() if dim is None else Shard(dim + leaf.ndim) for dim in cut])
        for tensor, shard in zip(given, shards, strict=True):
            if leaf.shape == shard.shape and leaf.stride() == shard.stride() and tensor.placements == places:
                shape, stride = tensor.shape, tensor.stride()  # not computed: Dynamo would lose symbols of sizes
                break
        else:
            sizes = list(leaf.shape)
            for dim in {dim for dim in cut if dim is not None}:
                number = next(n for n, t in enumerate(given) if not t.placements[cut.index(dim)].is_replicate())
                size, held = given[number].shape[dim], shards[number].shape[dim]
                if leaf.ndim < -dim or leaf.shape[dim] != held:
                    raise ValueError(
                        f"The kernel returned a tensor of shape {tuple(leaf.shape)} for a shard that has {held} of "
                        f"{size} positions in dimension {dim}: it is not local over that, as its {LOCAL} = {whole} "
                        "declares."
                    )
                sizes[dim] = size
            shape = torch.Size(sizes)
            stride = _strides(leaf, shape, cut)
        mesh = given[0].device_mesh
        if not fast:
            return _from_local(leaf, mesh, places, shape, stride)
        plan.outputs[look] = places, _whole_of(mesh, places, shape, stride, leaf.dtype)
        return _joined(leaf, *plan.outputs[look])

    @functools.wraps(forward, updated=())
    def sharded(*args: Any, **kwargs: Any) -> Any:
        fast = _is_plain()
        given = args[1:] if is_method else args
        more = [f"argument {number + 1}" for number in range(len(names), len(given))]
        looks = _looks([*zip((*names, *more), given, strict=False), *kwargs.items()])
        plan = Plan(looks) if isinstance(looks, str) else (_known_plan if fast else _plan)(looks, whole, even, fast)
        problem = plan.problem or (is_method and _not_whole(args[0], plan.backs[0].mesh))
        if problem:
            note(problem)
            return NotImplemented
        tensors = [value for value in (*given, *kwargs.values()) if isinstance(value, torch.Tensor)]
        shards = [_shard(tensor, back) for tensor, back in zip(tensors, plan.backs, strict=True)]
        rest = iter(shards)
        inputs = [next(rest) if isinstance(value, torch.Tensor) else value for value in given]
        named = {name: next(rest) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        output = forward(*((_of_shards(args[0], plan.shared, fast),) if is_method else ()), *inputs, **named)
        if isinstance(output, torch.Tensor):
            return placed(output, plan, tensors, shards, fast)
        if output is NotImplemented:
            return output
        return tree_map(lambda leaf: placed(leaf, plan, tensors, shards, fast), output)

    look = getattr(forward, "kernels_changed_part", None)
    if look is not None:  # it takes only plain parameters for such
        sharded.__dict__["kernels_changed_part"] = lambda module: look(_of_shards(module, None, False))
    sharded.__dict__["kernels_unlimited"] = unlimited(forward)
    return cast(Forward, layer.adapted.setdefault(key, (forward, sharded))[1])


def misplaced(implementation: object) -> str:
    """Return why a local kernel has last passed on a call with distributed tensors; empty if it never has."""
    return getattr(implementation, "kernels_misplaced", "")


def _looks(named: list[tuple[str, Any]]) -> tuple[Look, ...] | str:
    """Return how the distributed tensors of a call look; or which argument holds another tensor."""
    found: list[Look] = []
    for name, value in named:
        if isinstance(value, torch.Tensor):
            if not is_distributed(type(value)):
                return f"{name} is a plain tensor"
            held: Any = value
            found.append((name, held.device_mesh, held.placements, held.shape, held.stride(), held.dtype))
        elif held_by((value,))[0]:
            return f"{name} holds tensors in a {type(value).__name__}"
    return tuple(found) or "no argument is a DTensor"


def _plan(looks: tuple[Look, ...], whole: tuple[int, ...], even: bool, fast: bool) -> Plan:
    """Return the plan of such calls, which each rank makes alike."""
    from torch.distributed.tensor import Partial, Replicate

    cut, problem = _cut(looks, whole, even)
    if problem:
        return Plan(problem)
    shared = tuple([Replicate() if dim is None else Partial() for dim in cut])
    backs = []
    for _, mesh, placements, shape, stride, dtype in looks:
        back = tuple([theirs if ours.is_replicate() else ours for ours, theirs in zip(placements, shared, strict=True)])
        backs.append(_back(mesh, back, shape, stride, dtype, fast))
    return Plan("", cut, shared, tuple(backs), {})


_known_plan = functools.lru_cache(1024)(_plan)


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


def _of_shards(module: torch.nn.Module, shared: tuple[Any, ...] | None, fast: bool) -> torch.nn.Module:
    """Return a module with plain tensors in place of the distributed ones, and all else as in the original."""

    def shards(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: _shard(t, (_known_back if fast else _back)(t.device_mesh, shared, t.shape, t.stride(), t.dtype, fast))
            if is_distributed(type(t))
            else t
            for name, t in tensors.items()
        }

    made = object.__new__(type(module))  # a class may have a constructor
    children = {
        name: None if child is None else _of_shards(child, shared, fast) for name, child in module._modules.items()
    }
    state = {"_parameters": shards(module._parameters), "_buffers": shards(module._buffers), "_modules": children}
    made.__dict__.update(module.__dict__)
    made.__dict__.update(state)
    return made


# --- Into a kernel and out of it ---------------------------------------------------------------------


def _is_plain() -> bool:
    """Whether nothing watches a call: tracers know only PyTorch's own ways between a tensor and its shards."""
    return not (torch.compiler.is_compiling() or is_watched())


def _shard(tensor: Any, back: Back) -> torch.Tensor:
    """Return this rank's shard of a distributed tensor."""
    if back.whole_of is not None and tensor.requires_grad and torch.is_grad_enabled():
        return cast(torch.Tensor, _split(tensor, back))
    return cast(torch.Tensor, arrived(tensor.to_local(grad_placements=back.places)))


def _joined(shard: torch.Tensor, places: Any, whole_of: Callable[[torch.Tensor], Any]) -> Any:
    """Return the distributed tensor of which each rank has a shard."""
    return _join(shard, places, whole_of) if shard.requires_grad and torch.is_grad_enabled() else whole_of(shard)


def _from_local(shard: torch.Tensor, mesh: Any, places: Any, shape: torch.Size, stride: tuple[int, ...]) -> Any:
    """Do the same as tracers know it, and so that gradients of gradients can follow."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, mesh, places, run_check=False, shape=shape, stride=stride)


def _back(mesh: Any, places: Any, shape: torch.Size, stride: Any, dtype: torch.dtype, fast: bool) -> Back:
    """Return how the gradient of a tensor is placed."""
    return Back(mesh, places, shape, stride, _whole_of(mesh, places, shape, stride, dtype) if fast else None)


_known_back = functools.lru_cache(1024)(_back)


def _whole_of(mesh: Any, places: Any, shape: torch.Size, stride: Any, dtype: torch.dtype) -> Callable[..., Any]:
    """Return a function that makes the shard of each rank a distributed tensor, without a history."""
    from torch.distributed.tensor import DTensor

    spec = dtensor_spec(mesh, places, shape, stride, dtype)
    if spec is None:
        known: Any = {"device_mesh": mesh, "placements": places, "shape": shape, "stride": stride, "run_check": False}
        return lambda shard: DTensor.from_local(shard.detach(), **known)
    new: Any = DTensor.__new__  # its `__init__` does nothing
    return lambda shard: new(DTensor, shard.detach(), spec, requires_grad=False)


class _Split(torch.autograd.Function):
    """As `DTensor.to_local`: but how a gradient is placed is known before."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, back: Back) -> torch.Tensor:
        """Return the shard; a fresh tensor, for autograd writes its history on it."""
        shard = tensor.to_local()
        if is_pending(type(shard)):
            shard = shard.trigger_wait()
        ctx.set_materialize_grads(False)
        ctx.back, ctx.stride = back, shard.stride()
        return cast(torch.Tensor, shard if isinstance(shard, torch.nn.Parameter) else shard.view_as(shard))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[Any, ...]:
        """Place the gradient."""
        if gradient is None:
            return None, None
        mesh, places, shape, stride, whole_of = ctx.back
        same = gradient.stride() == ctx.stride
        if same and whole_of is not None and not torch.is_grad_enabled() and _is_plain():
            return whole_of(gradient), None
        if not same:
            dims = [place.dim - len(shape) if hasattr(place, "dim") else None for place in places]
            stride = _strides(gradient, shape, dims)
        return _from_local(gradient, mesh, places, shape, stride), None


class _Join(torch.autograd.Function):
    """As `DTensor.from_local`: but how the tensor is placed is known before."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, places: Any, whole_of: Callable[[torch.Tensor], Any]) -> Any:
        """Return the distributed tensor."""
        ctx.set_materialize_grads(False)
        ctx.places = places
        return whole_of(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        """Return the shard of the gradient, placed as the output is."""
        if gradient is not None:
            if gradient.placements != ctx.places:
                gradient = gradient.redistribute(placements=ctx.places)
            gradient = arrived(gradient.to_local())
        return gradient, None, None


# `apply` itself: PyTorch's function of that name first searches the arguments for tensors of transforms.
_split, _join = (cast(Any, super(torch.autograd.Function, each)).apply for each in (_Split, _Join))


def _strides(shard: torch.Tensor, shape: torch.Size, cut: Iterable[int | None]) -> tuple[int, ...]:
    """Return the strides of a tensor of which one like this is a shard."""
    strides = shard.stride()
    for dim in {dim for dim in cut if dim is not None}:
        size, held = shape[dim], shard.shape[dim]
        strides = tuple([s // held * size if s > shard.stride(dim) else s for s in strides])
    return strides
