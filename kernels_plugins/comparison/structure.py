"""Differences of two nested outputs that are not differences of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch

from kernels_core.replay import leaves, nodes

from .tolerance import TOLERANCES


def structure_mismatches(actual: object, expected: object) -> list[str]:
    """Return where two nested values hold other things."""
    ours, theirs = list(_containers(actual)), list(_containers(expected))
    if ours == theirs:
        return []
    for (path, kind, keys), (other, expected_kind, expected_keys) in zip(ours, theirs, strict=False):
        if path == other and kind is not expected_kind:
            return [f"{path or 'output'}: {kind.__name__} instead of {expected_kind.__name__}"]
        if path == other and keys != expected_keys:
            return [f"{path or 'output'}: holds {_listed(keys)} instead of {_listed(expected_keys)}"]
    return [f"output: {_listed(p for p, _ in leaves(actual))} instead of {_listed(p for p, _ in leaves(expected))}"]


def _containers(value: object) -> Iterator[tuple[str, type, tuple[str, ...]]]:
    return ((path, type(node), keys) for path, node, keys in nodes(value) if keys is not None)


def _listed(keys: Any) -> str:
    return ", ".join(key or "one value" for key in keys) or "nothing"


def value_mismatches(path: str, ours: object, theirs: object) -> list[str]:
    """Compare non-tensor leaves: by value where they have one, else by type."""
    if type(ours) is not type(theirs):
        return [f"{path}: {type(ours).__name__} instead of {type(theirs).__name__}"]
    if isinstance(ours, float) and isinstance(theirs, float):
        rtol, atol = TOLERANCES[torch.float64]  # Python computes in that
        both_nan = math.isnan(ours) and math.isnan(theirs)  # `isclose` calls NaN different from itself
        same = both_nan or math.isclose(ours, theirs, rel_tol=rtol, abs_tol=atol)
    elif isinstance(ours, str | bytes | int | complex | torch.Size | torch.dtype | torch.device):
        same = bool(ours == theirs)
    else:
        return []  # an object of an unknown class
    return [] if same else [f"{path}: {ours!r} instead of {theirs!r}"]


def metadata_mismatch(path: str, ours: object, theirs: torch.Tensor) -> str | None:
    """Return why two tensors cannot be compared number by number, None if they can."""
    if not isinstance(ours, torch.Tensor):
        return f"{path}: {type(ours).__name__} instead of a tensor"
    if ours.shape != theirs.shape:
        return f"{path}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    if ours.dtype != theirs.dtype:
        return f"{path}: {ours.dtype} instead of {theirs.dtype}"
    if ours.device != theirs.device:
        return f"{path}: on {ours.device} instead of {theirs.device}"
    if _is_distributed(ours) != _is_distributed(theirs):
        return f"{path}: a {type(ours).__name__} instead of a {type(theirs).__name__}"
    return None


def own_part(tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the part of a distributed tensor that this rank holds, placed as the expected tensor is.

    PyTorch has no distributed version of many operations that a comparison needs. Other tensors are whole.
    """
    if not _is_distributed(expected):
        return tensor
    from torch.distributed.tensor import Replicate  # a second; there is a distributed tensor, so it was done before

    # Parts of a sum are added up: two ranks may share them differently. All ranks of the mesh come here.
    places = [Replicate() if place.is_partial() else place for place in cast(Any, expected).placements]
    placed = cast(Any, tensor.detach()).redistribute(cast(Any, expected).device_mesh, places)
    return cast(torch.Tensor, placed.to_local())


def _is_distributed(tensor: torch.Tensor) -> bool:
    return hasattr(type(tensor), "placements")  # only `DTensor` has them; to import its module takes long
