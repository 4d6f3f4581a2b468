"""`MeasuredOn`: cells, and the machine that their times hold for."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels_core import ArgumentError, device_capability, set_module

from .cell import ChoiceCell

_LIBRARIES = ("triton", "liger-kernel", "transformers")


@dataclass(frozen=True)
class MeasuredOn:
    """The cells of one machine.

    Attributes:
        machine: The model of the device, its capability or threads, and the version of PyTorch.
        cells: What was measured there.
        libraries: The versions of Python and of libraries with kernels.
    """

    machine: Mapping[str, str]
    cells: tuple[ChoiceCell, ...]
    libraries: Mapping[str, str] = field(default_factory=dict)

    def merged(self, newer: MeasuredOn) -> MeasuredOn:
        """Return the cells of both; of two about the same calls, the newer one."""
        cells = {cell.place: cell for cell in (*self.cells, *newer.cells)}
        return replace(newer, cells=tuple(cells.values()))

    @classmethod
    def read(cls, value: Any) -> MeasuredOn:
        """Make it of what JSON has for it.

        Raises:
            ArgumentError: If it is malformed.
        """
        machine, versions = dict(value["machine"]), dict(value.get("libraries", {}))
        if not all(isinstance(text, str) for pair in (*machine.items(), *versions.items()) for text in pair):
            raise ArgumentError("the description of a machine is no text")
        return cls(machine, tuple(map(ChoiceCell.read, value["cells"])), versions)


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


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


set_module("kernels_plugins", globals())
