"""The kernels of a layer and the layers of a model, as a decision file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..device import device_capability
from ..errors import require_type
from ..resolution import Candidate
from .content import in_program


@dataclass(frozen=True)
class FrozenKernel:
    """A kernel that serves calls of a layer.

    Attributes:
        source: The candidate that it comes from, as in `Candidate.label`.
        origin: Where it comes from, as in `Resolution.origin`.
        content: The hash of its files or its code.
        plugin: The plugin that offers it.
        pin: What loads the very same kernel again, as in `LoadedLayer.pin`.
        record: The calls that it is offered for, as in `Candidate.record`.
    """

    source: str
    origin: str
    content: str = ""
    plugin: str = ""
    pin: Any = field(default=None, repr=False, hash=False)
    record: Any = field(default=None, repr=False, hash=False)

    def is_source(self, candidate: Candidate) -> bool:
        """Whether a candidate has the source that it came from.

        Args:
            candidate: The candidate.

        Example:
            >>> FrozenKernel("acme.Norm", "acme.Norm").is_source(Candidate("acme.Norm"))
            False
        """
        require_type(candidate, Candidate, "candidate")
        return in_program(candidate.label) == self.source

    def is_origin(self, origin: str) -> bool:
        """Whether this is its origin, in whichever module the program was started.

        Args:
            origin: The origin of a resolution.

        Example:
            >>> FrozenKernel("acme.Norm", "acme.Norm").is_origin("acme.Norm")
            True
        """
        require_type(origin, str, "origin")
        return in_program(origin) == self.origin

    def __str__(self) -> str:
        """Name it with the start of its hash."""
        buckets = " for the shapes that it was measured best for" if self.record is not None else ""
        return f"{self.origin}{f' [{self.content[:12]}]' if self.content else ''}{buckets}"


@dataclass(frozen=True)
class FrozenLayer:
    """A layer, and what serves it.

    Attributes:
        layer: The layer name.
        defined: The class or function that is decorated.
        paths: Where the kernels serve it in the model.
        kernels: The kernels; each serves the calls that those before it pass on, and the reference the rest.
        others: Where the model has it, and the kernels do not serve: the reason for each path.
        note: Why the reference serves, where it was chosen.
    """

    layer: str
    defined: str
    paths: tuple[str, ...] = ()
    kernels: tuple[FrozenKernel, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The layer, as calls know it: dispatch decides by layer, not by path."""
        return self.layer, self.defined

    def __str__(self) -> str:
        """The kernels in their order."""
        return ", then ".join(map(str, self.kernels)) or "reference"


@dataclass(frozen=True)
class FrozenModel:
    """The decisions for a model on one class of hardware, in one mode.

    Attributes:
        model: The class of the model.
        device: The type of the device.
        capability: The compute capability of the device, 90 for 9.0; None for devices without one.
        mode: The mode in words, as in receipts.
        decided: The decisions, by layer.
        torch: The version of PyTorch, for readers.
    """

    model: str
    device: str
    capability: int | None
    mode: str
    decided: tuple[FrozenLayer, ...]
    torch: str = ""

    @property
    def where(self) -> str:
        """The class of hardware in words.

        Example:
            >>> FrozenModel("Net", "cuda", 90, "inference", ()).where
            'cuda 9.0'
        """
        return self.device if self.capability is None else f"{self.device} {self.capability / 10}"


def hardware(device: torch.device) -> tuple[str, int | None]:
    """Return the class of hardware that a device is of: the type, and the compute capability."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type, device_capability(device)


def read_model(value: Any) -> FrozenModel:
    """Make the decisions for a model of their JSON; a value of the wrong type raises."""
    made = FrozenModel(**{**value, "decided": tuple(map(_layer, value["decided"]))})
    _check(made.model, made.device, made.mode, made.torch)
    if made.capability is not None and type(made.capability) is not int:
        raise TypeError(f"the capability {made.capability!r} is no number")
    return made


def _layer(value: Any) -> FrozenLayer:
    kernels = tuple(FrozenKernel(**kernel) for kernel in value["kernels"])
    made = FrozenLayer(**{**value, "kernels": kernels, "paths": tuple(value["paths"]), "others": dict(value["others"])})
    _check(made.layer, made.defined, made.note, *made.paths, *made.others, *made.others.values())
    for kernel in kernels:
        _check(kernel.source, kernel.origin, kernel.content, kernel.plugin)
    return made


def _check(*texts: object) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r:.100} is no text")
