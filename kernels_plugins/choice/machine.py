"""The machine that times hold for."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kernels_core import device_capability

_LIBRARIES = ("triton", "liger-kernel", "transformers")


def machine_of(device: torch.device) -> dict[str, str]:
    """Return what times depend on: the model of the device, its capability or threads, and the version of PyTorch."""
    if device.type == "cuda":
        what = {"model": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda or torch.version.hip)}
    else:
        what = {"model": _processor(), "threads": str(torch.get_num_threads())}
    return {
        "device": device.type,
        **what,
        "capability": str(device_capability(device) or ""),
        "torch": torch.__version__,
    }


def libraries() -> dict[str, str]:
    """Return the versions that may matter, too: a strict comparison looks at them."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
