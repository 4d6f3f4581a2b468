"""The machine of this process: what decides which build variants can be loaded."""

from __future__ import annotations

import importlib
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from kernels_core import ArgumentError

Release = tuple[int, int]
"""A major and a minor version."""


class Backend(NamedTuple):
    """How one kind of backend is written: in a folder's name, and for people."""

    tag: str
    title: str
    versioned: bool


BACKENDS = {
    "cpu": Backend("cpu", "the CPU backend", versioned=False),
    "cuda": Backend("cu", "CUDA", versioned=True),
    "rocm": Backend("rocm", "ROCm", versioned=True),
    "xpu": Backend("xpu", "XPU", versioned=True),
    "npu": Backend("cann", "CANN", versioned=True),
    "metal": Backend("metal", "Metal", versioned=False),
    "neuron": Backend("neuron", "Neuron", versioned=False),
    "tpu": Backend("tpu", "TPU", versioned=False),
}


@dataclass(frozen=True)
class Machine:
    """A machine, as far as it decides which build variants can be loaded."""

    torch: Release  # the version of torch
    backend: str = "cpu"  # the kind of backend: cpu, cuda, rocm, xpu, npu, metal, neuron or tpu
    backend_version: Release | None = None  # the version of CUDA, ROCm, XPU or CANN; None for the other kinds
    cpu: str = "x86_64"  # the processor, such as x86_64 or aarch64
    os: str = "linux"  # the system: linux, darwin or windows
    cxx11_abi: bool | None = True  # whether torch uses the C++11 ABI; None off Linux, where there is no choice
    tvm_ffi: Release | None = None  # the version of tvm-ffi, None if it is not installed
    macos: Release | None = None  # the version of macOS, None on another system
    abi3: bool = True  # whether this Python loads extension modules for the stable ABI of CPython

    @classmethod
    def here(cls, backend: str | None = None) -> Machine:
        """Describe the machine of this process, importing torch.

        Example:
            >>> Machine.here("cpu").backend
            'cpu'
        """
        import torch

        wanted = "npu" if backend == "cann" else backend
        kind, version = ("cpu", None) if wanted == "cpu" else _torch_backend()
        if wanted not in (None, kind):
            raise ArgumentError(
                f"backend is {backend!r}, and this torch has {' and '.join(sorted({'cpu', kind}))}: take one of them, "
                "or None for the one that it was built for."
            )
        cpu, system = platform.machine(), platform.system().lower()
        return cls(
            torch=_release(torch.__version__) or (0, 0),
            backend=kind,
            backend_version=version,
            cpu={"AMD64": "x86_64", "ARM64": "aarch64", "arm64": "aarch64"}.get(cpu, cpu),
            os=system,
            cxx11_abi=torch.compiled_with_cxx11_abi() if system == "linux" else None,
            tvm_ffi=_tvm_ffi_release(),
            macos=_macos_release() if system == "darwin" else None,
            # Free-threaded Python has a stable ABI from 3.15 on.
            abi3=sys.version_info >= (3, 15) or not sysconfig.get_config_var("Py_GIL_DISABLED"),
        )

    @property
    def backend_tag(self) -> str:
        """The backend and its version, as in the name of a folder: `cu128`."""
        return BACKENDS[self.backend].tag + digits(self.backend_version)

    @property
    def platform(self) -> str:
        """The processor and the system, as in the name of a folder."""
        return f"{self.cpu}-{self.os}"


@cache
def this_machine(backend: str | None = None) -> Machine:
    """Return the machine of this process, looked at once."""
    return Machine.here(backend)


def title(name: str, version: Release | None) -> str:
    """Return a name and a version as they are written for people: `CUDA 12.8`."""
    return f"{name} {version[0]}.{version[1]}" if version else name


def digits(version: Release | None) -> str:
    """Return a version as it is written in the name of a folder."""
    return f"{version[0]}{version[1]}" if version else ""


def _release(text: str) -> Release | None:
    """The major and minor version that a text starts with."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _torch_backend() -> tuple[str, Release | None]:
    """The kind of backend that torch was built for, whether or not this machine has such a device."""
    import torch

    # These two plug into a torch that was built for something else, so they go first.
    if hasattr(torch.backends, "tpu"):
        return "tpu", None
    if hasattr(torch, "neuron"):
        return "neuron", None
    for kind, version in (("cuda", torch.version.cuda), ("rocm", torch.version.hip)):
        if version is not None:
            return kind, _release(version)
    if torch.backends.mps.is_available():
        return "metal", None
    if xpu := getattr(torch.version, "xpu", None):
        # The compiler's version as a date-like number: 20250201 is 2025.2.
        return "xpu", (int(xpu[:4]), int(xpu[5]))
    if _extension_backend() == "npu":
        return "npu", _release(importlib.import_module("torch_npu.utils.collect_env").get_cann_version())
    return "cpu", None


def _extension_backend() -> str:
    """Return the type of the devices that an extension brings, such as "npu"; "privateuseone" without one."""
    import torch

    return torch.device("privateuseone").type  # an extension renames this type


def _tvm_ffi_release() -> Release | None:
    try:
        return _release(importlib.import_module("tvm_ffi").__version__)
    except (ImportError, OSError):
        return None  # not installed, or its library does not load


def _macos_release() -> Release | None:
    release = _release(platform.mac_ver()[0])
    # macOS 26 calls itself 16 to a program that was linked against an older SDK; there is no real 16.
    return (26, release[1]) if release and release[0] == 16 else release
