"""The first run of a kernel, on copies: does it do anything that an operator must not do?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kernels_core.replay import Replay
from kernels_core.torch_internals import DispatchMode, storage_key, written_arguments

from ..comparison import metadata_mismatch
from .structure import Unfit
from .work import Taken


class OperatorWatch(DispatchMode):  # type: ignore[no-untyped-call]
    """Notices changes that tensors without data do not show: writes to them, and random numbers."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()  # positions of tensors
        self.draws = False
        self._watched = {storage_key(tensor): index for index, tensor in enumerate(tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the tensors that an operator declares that it writes to."""
        kwargs = kwargs or {}
        self.draws = self.draws or torch.Tag.nondeterministic_seeded in func.tags
        written = {storage_key(tensor) for tensor in written_arguments(func, args, kwargs)}
        self.written |= {self._watched[key] for key in written & self._watched.keys()}
        return func(*args, **kwargs)


def check_replay(replay: Replay, outputs: Iterable[torch.Tensor]) -> None:
    """Raise `Unfit` if a kernel that ran on copies changed or returned an input, or changed the module."""
    for name in replay.mutated():
        raise Unfit(f"it changes {name} in place")
    check_attributes(replay)
    owners = {owner_of(tensor) for tensor in replay.call.tensors.values()}
    if any(owner_of(tensor) in owners for tensor in outputs):
        raise Unfit("it returns one of its inputs, or a view of one")


def check_attributes(replay: Replay) -> None:
    """Raise `Unfit` if a run has set or deleted attributes of modules, or items of lists and dicts."""
    if changed := replay.attributes():
        raise Unfit(f"it changes Python state: {', '.join(changed)}")


def check_alike(ours: Taken, theirs: Taken) -> None:
    """Raise `Unfit` if structure, shapes, dtypes or devices of a kernel's result are not those of the reference."""
    if ours[0] != theirs[0]:
        raise Unfit("its result is not built as that of the reference")
    for index, (one, other) in enumerate(zip(ours[1].tensors, theirs[1].tensors, strict=True)):
        if mismatch := metadata_mismatch(f"output {index + 1}", one, other):
            raise Unfit(mismatch)


def fresh(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return contiguous tensors that share no memory with each other."""
    owners: set[object] = set()
    found = []
    for tensor in tensors:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        owner = owner_of(plain)  # `contiguous` returns the tensor itself where it is contiguous
        found.append(plain.clone() if owner in owners else plain)
        owners.add(owner)
    return found


def owner_of(tensor: torch.Tensor) -> object:
    """Return a key that tensors share which use the same memory; a tensor without elements uses none."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.untyped_storage().data_ptr())
