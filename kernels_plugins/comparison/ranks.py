"""Steps of a comparison that all ranks of a device mesh take together: where one rank fails, none goes on alone.

A step may start collectives, as the reference does on `DTensor`s, and a rank that left one out would keep the others
waiting. So after each step, the ranks exchange whether it has failed on any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def mesh_of(tensors: Iterable[object]) -> Any:
    """Return the device mesh of the first `DTensor` among some tensors; None without one."""
    mesh = next(filter(None, (getattr(tensor, "device_mesh", None) for tensor in tensors)), None)
    return getattr(mesh, "real_obj", mesh)  # compiled code leaves stand-ins for meshes in the caches of `DTensor`


def on_any(found: bool, mesh: Any) -> bool:
    """Return whether something was found on any rank of a mesh; on this one, where there is no mesh."""
    if mesh is None:
        return found
    number = torch.tensor([float(found)], device=mesh.device_type)
    for group in mesh.get_all_groups():  # along each dimension in turn, it reaches every rank
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=group)
    return bool(number.item())


def together(mesh: Any, step: Callable[[], T]) -> T:
    """Take a step; where it raises on one rank of a mesh, it raises on all.

    Raises:
        RuntimeError: If it has raised on another rank only.
        Exception: The error of this rank.

    Example:
        >>> together(None, lambda: 1)
        1
    """
    try:
        result = step()
    except Exception:
        on_any(True, mesh)
        raise
    if on_any(False, mesh):
        raise RuntimeError("another rank of the mesh has failed there, and says why")
    return result


def jointly(forward: Callable[..., T], mesh: Any) -> Callable[..., T]:
    """Return a forward that all ranks take together: the run compares changed inputs afterwards, with collectives."""
    if mesh is None:
        return forward
    return functools.wraps(forward)(lambda *args, **kwargs: together(mesh, lambda: forward(*args, **kwargs)))
