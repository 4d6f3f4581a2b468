"""The first run of a kernel, on copies: does it do anything that an operator must not do?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kernels_core import Scope
from kernels_core.torch_internals import DispatchMode, storage_key, written_arguments

from ..mapping import use_kernel_mapping
from .structure import Call, Parts, Structure, Unfit, take

Forward = Callable[..., Any]

_references: Scope | None = None


@contextlib.contextmanager
def on_references() -> Iterator[None]:
    """Run decorated layers on their references."""
    global _references
    if _references is None:
        _references = use_kernel_mapping({}, inherit_mapping=False)
    with _references:
        yield


class Watch(DispatchMode):  # type: ignore[no-untyped-call]
    """Notices what tensors without data do not show: which of them are written to, and whether chance is asked.

    Attributes:
        written: Their positions.
        draws: Whether random numbers are drawn.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember whose memory is watched."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.draws = False
        self._watched = {storage_key(tensor): index for index, tensor in enumerate(tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what an operator says that it writes to."""
        kwargs = kwargs or {}
        self.draws = self.draws or torch.Tag.nondeterministic_seeded in func.tags
        written = {storage_key(tensor) for tensor in written_arguments(func, args, kwargs)}
        self.written |= {self._watched[key] for key in written & self._watched.keys()}
        return func(*args, **kwargs)


def copies_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies with the same strides; the same tensor given twice is copied once."""
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in made:
            plain = tensor.detach()
            made[id(tensor)] = (
                torch.empty_strided(plain.size(), plain.stride(), dtype=plain.dtype, device=plain.device).copy_(plain)
                if _is_dense(plain)
                else plain.clone()
            )
    return [made[id(tensor)] for tensor in tensors]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is plainly strided, without elements that share memory."""
    return tensor.layout is torch.strided and type(tensor) is torch.Tensor and 0 not in tensor.stride()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is the same as NaN."""
    if one.element_size() == 1:  # numbers of eight bits and fewer cannot all be compared, but their bits can
        return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
    if one.is_floating_point() or one.is_complex():
        return bool(torch.equal(one, other) or ((one == other) | ((one != one) & (other != other))).all())
    return bool(torch.equal(one, other))


def check_run(call: Call, copies: Sequence[torch.Tensor], originals: Sequence[torch.Tensor], output: Any) -> None:
    """Look at what a run on copies has done.

    Raises:
        Unfit: If it changed or returned what it was given, or changed the module.
    """
    for name, copy, original in zip(call.names, copies, originals, strict=True):
        if not same_bits(copy, original.detach()):
            raise Unfit(f"it changes {name} in place")
    check_state(call)
    owners = {_owner(tensor) for tensor in copies}
    for tensor in output:
        if _owner(tensor) in owners:
            raise Unfit("it returns one of its inputs, or a view of one")


def check_state(call: Call) -> None:
    """Look whether Python state was changed.

    Raises:
        Unfit: If it was.
    """
    changed = call.changed()
    if changed:
        raise Unfit(f"it changes Python state: {', '.join(changed)}")


def check_alike(ours: tuple[Structure, Parts], theirs: tuple[Structure, Parts]) -> None:
    """Compare what a kernel returned with what the reference would.

    Raises:
        Unfit: If structure, shapes, dtypes or devices differ.
    """
    if ours[0] != theirs[0]:
        raise Unfit("what it returns is not built as what the reference returns")
    for index, (one, other) in enumerate(zip(ours[1].tensors, theirs[1].tensors, strict=True)):
        mine, expected = _look(one), _look(other)
        if mine != expected:
            raise Unfit(f"output {index + 1} is {mine}, and that of the reference is {expected}")


def _look(tensor: torch.Tensor) -> str:
    shape = "x".join(str(int(size)) for size in tensor.shape) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} on {tensor.device}"


def _owner(tensor: torch.Tensor) -> object:
    """Tell whose memory a tensor uses; nobody's if it has no element."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.untyped_storage().data_ptr())


def apart(output: Any) -> tuple[Structure, Parts]:
    """Take what a forward returned apart."""
    parts = Parts()
    return take(output, parts), parts


def fresh(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return contiguous tensors that share no memory with each other."""
    owners: set[object] = set()
    found = []
    for tensor in tensors:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        owner = _owner(plain)
        found.append(plain.clone() if owner in owners else plain)
        owners.add(owner)
    return found
