"""Architectures: compares `backend.archs` in the metadata of a build with the capability of a device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .metadata import BackendInfo

if TYPE_CHECKING:
    import torch

_CUDA = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?", re.ASCII)


def find_mismatch(backend: BackendInfo, device: torch.device | None = None) -> str | None:
    """Return why a build cannot run on a device; None if it can, or if its architectures are not known.

    Two GPUs of one machine may differ.

    Example:
        >>> find_mismatch(BackendInfo("cuda", ("9.0a",)), torch.device("cpu")) is None
        True
    """
    import torch

    if not backend.archs or (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    if backend.backend_type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(index)
        if not runs_on_cuda(backend.archs, capability):
            return _mismatch(backend.archs, f"cuda:{index} has capability {capability[0]}.{capability[1]}")
    elif backend.backend_type == "rocm" and torch.version.hip is not None:
        gfx = torch.cuda.get_device_properties(index).gcnArchName
        if not runs_on_rocm(backend.archs, gfx):
            return _mismatch(backend.archs, f"cuda:{index} is {gfx}")
    return None


def runs_on_cuda(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for some of these architectures runs on a GPU of this capability.

    `9.0` runs on 9.0 and later minor versions, as `9.0f` does; `9.0a` only on 9.0; `9.0+PTX` on all newer
    ones, too. If none is written like that, their meaning is not known, and it may run.

    Example:
        >>> runs_on_cuda(["8.0", "9.0a"], (8, 6)), runs_on_cuda(["8.0", "9.0a"], (10, 0))
        (True, False)
    """
    read = [match.groups() for arch in archs if (match := _CUDA.fullmatch(arch))]
    return not read or any(_runs((int(ma), int(mi)), suffix, bool(ptx), capability) for ma, mi, suffix, ptx in read)


def runs_on_rocm(archs: Iterable[str], gfx: str) -> bool:
    """Whether a GPU is one of these architectures; features after a colon are not compared.

    Example:
        >>> runs_on_rocm(["gfx90a"], "gfx90a:sramecc+:xnack-")
        True
    """
    return gfx.partition(":")[0] in archs


def _runs(arch: tuple[int, int], suffix: str, ptx: bool, capability: tuple[int, int]) -> bool:
    if suffix == "a":
        return capability == arch
    if ptx and not suffix:
        return capability >= arch
    return capability[0] == arch[0] and capability[1] >= arch[1]


def _mismatch(archs: Iterable[str], device: str) -> str:
    return (
        f"it has code for {', '.join(archs)}, and {device}. Ask the publisher for a build; or if you know that it runs "
        "there, as with code in Triton, load it with get_kernel(..., check_arch=False)"
    )
