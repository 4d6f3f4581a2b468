"""Requirements of a build: a level of the kernel interface, Python packages, code for the device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from packaging.version import Version

from kernels_core import warn_once

from ..errors import PackageError, UnknownError, UnsuitableError
from .metadata import BackendInfo, Metadata

if TYPE_CHECKING:
    import torch

INTERFACE_LEVEL = Version("0.17")
"""Level of the kernel interface that this package implements; `kernels-minver` is compared with it."""

_CUDA = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?", re.ASCII)

Package = tuple[str, str | None]
"""The name to install, and the module to import; None if there is none, as for libraries that are not Python."""

_GENERAL: dict[str, Package] = {
    "einops": ("einops", "einops"),
    "helion": ("helion", "helion"),
    "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
}
_OF_BACKEND: dict[str, dict[str, Package]] = {
    "cuda": {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": ("nki", "nki")},
    "xpu": {"onednn": ("onednn-devel", None)},
}


def check_requirements(metadata: Metadata, backends: Iterable[str] = ()) -> None:
    """Refuse a build that this process cannot import; `backends` of this machine may need packages of their own."""
    minver = metadata.kernels_minver
    if minver is not None and minver.release[:2] > INTERFACE_LEVEL.release[:2]:  # patch releases change no interface
        raise UnsuitableError(
            f"it asks for level {minver} of the kernel interface (kernels-minver), and kernels-core "
            f"implements {INTERFACE_LEVEL}. Upgrade with: pip install --upgrade kernels-core"
        )
    check_packages(metadata.python_depends, (metadata.backend.backend_type, *backends))


def check_packages(names: Iterable[str], backends: Iterable[str]) -> None:
    """Refuse a kernel whose Python packages are not installed; each kind of backend allows packages of its own.

    Example:
        >>> check_packages(["onednn"], ["cpu"])
        Traceback (most recent call last):
        ...
        kernels_plugins.hub.errors.UnknownError: it needs the Python package ...onednn..., which kernels for ...
    """
    kinds = tuple(dict.fromkeys(backends))
    known = dict(_GENERAL)
    for backend in kinds:
        known |= _OF_BACKEND.get(backend, {})
    missing = []
    for name in names:
        if name not in known:
            raise UnknownError(
                f"it needs the Python package {name!r}, which kernels for {' and '.join(kinds)} may not: those that "
                f"may be needed are {', '.join(sorted(known))}. Tell its publisher, or upgrade kernels-core"
            )
        package, module = known[name]
        if module is not None and not _is_installed(module):
            missing.append(package)
    if missing:
        command = f"pip install {' '.join(dict.fromkeys(missing))}"
        raise PackageError(f"it needs Python packages that are not installed. Install with: {command}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that cannot be imported, or a module without a spec
        return False


def check_device(metadata: Metadata) -> None:
    """Refuse a build that has no code for the current device."""
    if mismatch := find_mismatch(metadata.backend):
        raise UnsuitableError(mismatch)


def find_mismatch(backend: BackendInfo, device: torch.device | None = None) -> str | None:
    """Return why a build cannot run on a device, by default the current one; None if it can, or if that is not known.

    Two GPUs of one machine may differ.

    Example:
        >>> find_mismatch(BackendInfo("cuda", ("9.0a",)), torch.device("cpu")) is None
        True
    """
    import torch

    archs = backend.archs
    if not archs or (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    found = None
    if backend.backend_type == "cuda" and torch.version.cuda is not None:
        capability = torch.cuda.get_device_capability(index)
        if not runs_on_cuda(archs, capability):
            found = "has capability {}.{}".format(*capability)
    elif backend.backend_type == "rocm" and torch.version.hip is not None:
        gfx = torch.cuda.get_device_properties(index).gcnArchName  # with features, as in gfx90a:xnack-
        if not runs_on_rocm(archs, gfx):
            found = f"is {gfx}"
    return found and (
        f"it has code for {', '.join(archs)}, and cuda:{index} {found}. Ask the publisher for a build; or if you know "
        "that it runs there, as with code in Triton, load it with get_kernel(..., check_arch=False)"
    )


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


def _runs(arch: tuple[int, int], suffix: str, ptx: bool, capability: tuple[int, int]) -> bool:
    if suffix == "a":  # code that uses what only this architecture has
        return capability == arch
    if ptx and not suffix:
        return capability >= arch
    return capability[0] == arch[0] and capability[1] >= arch[1]


def runs_on_rocm(archs: Iterable[str], gfx: str) -> bool:
    """Whether a GPU is one of these architectures; features after a colon are not compared.

    Example:
        >>> runs_on_rocm(["gfx90a"], "gfx90a:sramecc+:xnack-")
        True
    """
    return gfx.partition(":")[0] in archs


def warn_dirty(metadata: Metadata, place: str) -> None:
    """Warn once about a build from sources with changes that were not committed."""
    if metadata.provenance is not None and metadata.provenance.dirty:
        warn_once(
            f"{place}: {metadata.name} was built while sources of {' and '.join(metadata.provenance.dirty_sources)} "
            "had changes that were not committed (dirty): its commit does not identify them. Ask the publisher for a "
            "build from committed sources.",
        )
