"""Copies of tensors and modules that lie in memory, and share it, as the originals do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from ..nested import leaves, mapped

_ALIGNMENT = 256
"""Copies start at an address as round as that of their originals: kernels take another path for others."""

_INSIDE = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps its tensors and modules."""


def copies_of(originals: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Copy tensors, by the `id` of the original.

    Strides are kept; tensors that share memory share it in their copies. A tensor that is more than a view of memory
    (sparse, quantized, a subclass) is cloned by its own `clone`, one with attributes is copied by `deepcopy`.
    """
    copies: dict[int, torch.Tensor] = {}
    spans: dict[object, list[tuple[int, int, torch.Tensor]]] = {}
    for tensor in originals:
        if id(tensor) in copies:
            continue
        if not _is_plain(tensor):
            copies[id(tensor)] = _copied_special(tensor)
            continue
        copies[id(tensor)] = with_memory(tensor)  # keeps its place in the order until it is copied below
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * tensor.itemsize
        end = start + (int(reach) + 1) * tensor.itemsize
        spans.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append((start, end, tensor))
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        while group:
            together = [group.pop(0)]
            end = together[0][1]
            while group and group[0][0] < end:  # overlapping: views of one part of a tensor, in any order
                together.append(group.pop(0))
                end = max(end, together[-1][1])
            copies.update(_copied_span(together, end))
    return copies


def _copied_span(span: list[tuple[int, int, torch.Tensor]], end: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Copy a stretch of memory, and yield each tensor in it as a view of the copy."""
    start, _, first = span[0]
    if len(span) == 1 and start % _ALIGNMENT == 0 and first.is_contiguous():  # `clone` aligns, and keeps these strides
        yield id(first), first.detach().clone()
        return
    start -= start % _ALIGNMENT  # take the bytes before, too, so that the copy is aligned as its original
    memory = torch.empty(0, dtype=torch.uint8, device=first.device)
    memory = memory.set_(first.untyped_storage(), start, (end - start,), (1,)).clone()
    for at, _, tensor in span:
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset = (at - start) // tensor.itemsize
        yield id(tensor), empty.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())


def _copied_special(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor that is more than a view of memory."""
    # PyTorch's operators drop the attributes of a subclass, and mostly the class. A forward that reads them, as with
    # the parameters of libraries for quantization, needs a copy by `deepcopy`, which such a class must support.
    return copy.deepcopy(tensor) if _has_attributes(tensor) else tensor.detach().clone()


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its history; one whose attributes would be lost has none, for it is a copy."""
    return tensor if _has_attributes(tensor) else tensor.detach()


def _has_attributes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass with attributes, and is not built of other tensors, as those clone rightly."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or hasattr(type(tensor), "__tensor_flatten__"):
        return False
    return tensor.is_leaf and bool(getattr(tensor, "__dict__", None))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view of memory and nothing else."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type not in ("meta", "xla")  # without memory, or with one that has no address
        and tensor.numel() > 0
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or raise if its memory was freed, as by FSDP after a forward: to read it ends the process."""
    if _is_plain(tensor) and not tensor.untyped_storage().nbytes():
        raise RuntimeError("the memory of a tensor was freed meanwhile")
    return tensor


def replica_of(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Copy a module and every module in it, with `make(tensor)` in place of its tensors.

    Lists and dicts in attributes are copied, too; hooks and other objects are shared.
    """
    made: dict[int, Any] = {}

    def replaced(_: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in made:
            copied = make(leaf)
            if isinstance(leaf, nn.Parameter) and not isinstance(copied, nn.Parameter):
                copied = nn.Parameter(copied, leaf.requires_grad)
            made[id(leaf)] = copied.requires_grad_(leaf.requires_grad)
        return made.get(id(leaf), leaf) if isinstance(leaf, nn.Module | torch.Tensor) else leaf

    originals = list(module.modules())
    for original in originals:
        kind = type(original)
        made[id(original)] = object.__new__(kind)  # not its own `__new__`: that of FSDP's classes calls `__init__`
    for original in originals:
        state = dict(original.__dict__)  # past `__setattr__`, which would register parameters again
        for name in _INSIDE:
            state[name] = {key: replaced(key, value) for key, value in state[name].items()}
        for name, value in _attributes(original):
            if isinstance(value, list | dict | torch.Tensor):
                state[name] = mapped(value, replaced)
        made[id(original)].__dict__.update(state)
    return cast(nn.Module, made[id(module)])


def attributes_of(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the attributes of a module and of every module in it, by path, without those that PyTorch manages."""
    for path, inner in module.named_modules():
        for name, value in _attributes(inner):
            yield f"{path}.{name}" if path else name, value


def generators_of(value: object) -> list[torch.Generator]:
    """Return the random generators in a nested value, and in attributes of a module or a list of modules.

    Example:
        >>> class Noise(torch.nn.Module):
        ...     generators = ()
        >>> noise = Noise()
        >>> noise.generators = [torch.Generator()]
        >>> len(generators_of(torch.nn.Sequential(noise)))
        1
    """
    held = list(value) if isinstance(value, list | tuple) else [value]
    modules = [each for each in held if isinstance(each, nn.Module)]
    held += [one for module in modules for _, one in attributes_of(module)]
    nested = (each for each in held if isinstance(each, torch.Generator | list | dict | tuple))
    found = (leaf for each in nested for _, leaf in leaves(each))
    return list(dict.fromkeys(leaf for leaf in found if isinstance(leaf, torch.Generator)))


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    return ((name, value) for name, value in module.__dict__.items() if name not in _INSIDE and "_hooks" not in name)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module by kind and path, each once: parameters, buffers, and those in attributes."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, inner in module.named_modules():
        path = f"{path}." if path else ""
        for kind, tensors in (("parameter", inner._parameters), ("buffer", inner._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (f"{kind} {path}{name}", tensor))
        for name, value in _attributes(inner):
            if isinstance(value, list | dict | torch.Tensor):
                for where, leaf in leaves(value, f"attribute {path}{name}"):
                    if isinstance(leaf, torch.Tensor):
                        found.setdefault(id(leaf), (where, leaf))
    return dict(found.values())


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same numbers; NaN is equal to NaN here.

    Example:
        >>> same_numbers(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
        True
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = with_memory(one), with_memory(other)
    with torch.no_grad():
        if one.layout != torch.strided:  # PyTorch compares no sparse tensors
            one, other = one.to_dense(), other.to_dense()
        if one.itemsize == 1 and not one.is_quantized:
            # PyTorch compares few of the dtypes of 8 bits, but the bits of each.
            return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
        return bool(torch.equal(one, other) or ((one == other) | ((one != one) & (other != other))).all())
