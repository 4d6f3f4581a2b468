"""Devices in mappings and in calls: one table of names, one notion of capability, and the device of a call."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import ArgumentError, ArgumentTypeError, require_type
from .nested import first_tensor
from .torch_internals import on_cuda_start

TORCH_DEVICE_TYPES = {
    "cpu": "cpu",
    "cuda": "cuda",
    "rocm": "cuda",  # PyTorch calls AMD devices "cuda" too
    "metal": "mps",
    "mps": "mps",
    "neuron": "neuron",
    "npu": "npu",
    "tpu": "tpu",
    "xpu": "xpu",
}
"""Device names that a mapping may use, with the type that PyTorch gives to their tensors."""

_BROUGHT_BY_PACKAGES = ("neuron", "npu", "tpu")
"""Device types that packages beside PyTorch add."""


@dataclass(frozen=True)
class _Capabilities:
    """A range of compute capabilities, both ends included."""

    min_capability: int
    max_capability: int

    def __post_init__(self) -> None:
        for name in ("min_capability", "max_capability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"{name} must be an integer such as 75 for capability 7.5, not {value!r}.")
        if self.min_capability > self.max_capability:
            raise ArgumentError(
                f"min_capability ({self.min_capability}) is larger than max_capability "
                f"({self.max_capability}): no device is in that range. Swap the two."
            )

    @property
    def width(self) -> int:
        """Size of the range; the narrowest range that holds a device wins."""
        return self.max_capability - self.min_capability

    def holds(self, capability: int | None) -> bool:
        """Whether a device of this capability is in the range."""
        return capability is not None and self.min_capability <= capability <= self.max_capability


class CUDAProperties(_Capabilities):
    """A range of CUDA compute capabilities, both ends included.

    Args:
        min_capability: Smallest capability, 75 for 7.5.
        max_capability: Largest capability, 90 for 9.0.

    Raises:
        ArgumentError: If the range is empty.
        ArgumentTypeError: If an end is no integer.

    Example:
        >>> CUDAProperties(min_capability=75, max_capability=89).holds(80)
        True
    """


class ROCMProperties(_Capabilities):
    """A range of ROCm capabilities (the digits of the gfx number), both ends included.

    Args and errors as for `CUDAProperties`.
    """


_PROPERTIES_OF: dict[str, type[CUDAProperties | ROCMProperties]] = {"cuda": CUDAProperties, "rocm": ROCMProperties}
_UNITS = {"cuda": "sm", "rocm": "gfx"}
_BOUND = re.compile(r"(>=|<=|==|>|<)(\d{1,4})")


@dataclass(frozen=True)
class Device:
    """A kind of device in a mapping, narrowed to a range of capabilities if wanted.

    Args:
        type: One of `cpu`, `cuda`, `rocm`, `mps` (or `metal`), `npu`, `neuron`, `tpu`, `xpu`.
        properties: `CUDAProperties` for `cuda`, `ROCMProperties` for `rocm`, else None.

    Raises:
        ArgumentError: For an unknown type, or properties of another device.

    Example:
        >>> Device("cuda", CUDAProperties(80, 90)).matches(torch.device("cuda", 0), capability=86)
        True
    """

    type: str
    properties: CUDAProperties | ROCMProperties | None = None

    def __post_init__(self) -> None:
        """Refuse a type on which there can be no tensor."""
        if not isinstance(self.type, str):
            raise ArgumentTypeError(f"A device type is a string such as 'cuda', not {self.type!r}.")
        kind, colon, _ = self.type.partition(":")
        if colon and kind in TORCH_DEVICE_TYPES:
            raise ArgumentError(
                f"Device type {self.type!r} has an index: a mapping is for all devices of a type. Write "
                f"{kind!r}, and narrow it by capability if need be."
            )
        if self.type not in TORCH_DEVICE_TYPES:
            raise ArgumentError(
                f"Unknown device type {self.type!r}: use one of {', '.join(sorted(TORCH_DEVICE_TYPES))}."
            )
        wanted = _PROPERTIES_OF.get(self.type)
        if self.properties is not None and (wanted is None or not isinstance(self.properties, wanted)):
            expected = wanted.__name__ if wanted else "no properties"
            raise ArgumentError(f"Device {self.type!r} takes {expected}, not {type(self.properties).__name__}.")

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device that a text names: a type, or a type and bounds of its capability.

        Args:
            text: `"cuda"`, `"cuda:sm>=90"` or `"cuda:sm>=80,<90"`; for `rocm`, `gfx` takes the place of `sm`. The
                bounds are `>=`, `>`, `<=`, `<` and `==`, and all of them hold.

        Raises:
            ArgumentError: If it names none.

        Example:
            >>> Device.parse("cuda:sm>=80,<90")
            Device(type='cuda', properties=CUDAProperties(min_capability=80, max_capability=89))
        """
        require_type(text, str, "The text of a device")
        kind, _, bounds = text.partition(":")
        unit = _UNITS.get(kind, "")
        if not unit or not bounds.startswith(unit):
            return cls(text)
        low, high = 0, sys.maxsize
        for bound in bounds.removeprefix(unit).split(","):
            if (found := _BOUND.fullmatch(bound.strip())) is None:
                raise ArgumentError(
                    f"{text!r} has the bound {bound!r}: write '{kind}:{unit}>=90' or '{kind}:{unit}>=80,<90'."
                )
            sign, number = found[1], int(found[2])
            if sign != "<" and sign != "<=":
                low = max(low, number + (sign == ">"))
            if sign != ">" and sign != ">=":
                high = min(high, number - (sign == "<"))
        return cls(kind, _PROPERTIES_OF[kind](low, high))

    def matches(self, device: torch.device, *, capability: int | None = None) -> bool:
        """Whether a tensor on `device`, of that `capability`, is on such a device."""
        if not isinstance(device, torch.device):
            require_type(device, torch.device, "device")
        if TORCH_DEVICE_TYPES[self.type] != device.type:  # two names may be one type: mps and metal
            return False
        # PyTorch calls both "cuda": its build tells them apart.
        if device.type == "cuda" and (self.type == "rocm") != (torch.version.hip is not None):
            return False
        return self.properties is None or self.properties.holds(capability)


def device_capability(device: torch.device) -> int | None:
    """Return the compute capability of one device, 90 for 9.0, or None for devices without one.

    Cached per device index: two GPUs of one machine may differ.
    """
    if not isinstance(device, torch.device):
        require_type(device, torch.device, "device")
    return _capability(device)


@cache
def _capability(device: torch.device) -> int | None:
    # "cuda" is also asked for where there is none, by receipts.
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except AssertionError:  # PyTorch raises it for a device that is not there
        return None
    return 10 * major + minor  # as in mappings


def as_torch_device(device: torch.device | Device | str) -> torch.device:
    """Turn any name of a device into a `torch.device`, with an index where there are several, or raise."""
    if isinstance(device, Device):
        device = TORCH_DEVICE_TYPES[device.type]
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind in TORCH_DEVICE_TYPES:
        device = TORCH_DEVICE_TYPES[kind] + colon + index
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        if kind in _BROUGHT_BY_PACKAGES:
            raise ArgumentError(
                f"This PyTorch does not know the device {device!r}: import the package that brings it, such as "
                "torch_npu or torch_neuronx, or use another device."
            ) from error
        raise ArgumentError(
            f"Unknown device {device!r}: use one of {', '.join(sorted(TORCH_DEVICE_TYPES))}, with an index where "
            "there are several ('cuda:1')."
        ) from error
    if index and int(index) != found.index:  # PyTorch silently keeps only the last eight bits
        raise ArgumentError(f"No machine has a device {device!r}: indices are small numbers, as in 'cuda:1'.")
    # Else "cuda" and "cuda:0" would have two decisions: tensors always have an index.
    if found.index is None and found.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


# --- Devices of calls -----------------------------------------------------------------------------

_BUILT_FOR = {
    "cuda": torch.version.cuda or torch.version.hip,
    "xpu": getattr(torch.version, "xpu", None),
    "mps": torch.backends.mps.is_built(),
}
ACCELERATOR = next((kind for kind, built in _BUILT_FOR.items() if built), None)
"""Type of the accelerators that this PyTorch is built for: they are read directly, other types by the cold path."""

MAX_INDEX = 8
"""How many accelerators are read directly."""


class _Hardware:
    """The number of accelerators: with one, calls need not ask for its index; with none, only whether it is the CPU."""

    __slots__ = ("accelerators",)

    def __init__(self) -> None:
        self.accelerators = 0 if ACCELERATOR in ("cuda", None) else 1 if ACCELERATOR == "mps" else MAX_INDEX

    def count(self) -> None:
        """Count; run when CUDA starts, before which there is no tensor on it."""
        self.accelerators = torch.cuda.device_count()


hardware = _Hardware()
if ACCELERATOR == "cuda" and not on_cuda_start(hardware.count):
    hardware.accelerators = MAX_INDEX  # right for any number, one question slower


def find_device(module: torch.nn.Module | None, values: Sequence[Any]) -> torch.device | None:
    """Return the device of the first tensor: among arguments and in containers, of the module, in attributes."""
    first = values[0] if values and isinstance(values[0], torch.Tensor) else first_tensor(values, attributes=False)
    if first is not None:
        return first.device
    if module is not None:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            return tensor.device
    first = first_tensor(values)
    return first.device if first is not None else None
