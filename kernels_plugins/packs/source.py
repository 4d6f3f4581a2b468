"""`Pack`: a source that is written `"pack:NAME"` in a mapping, or `"pack:NAME:LAYER"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels_core import ArgumentError, LoadError, plugin_manager

PREFIX = "pack:"


def _packs() -> dict[str, Callable[[str, torch.device], Any]]:
    """Return the packs of all plugins by name; of two with one name, that of the plugin that was registered first."""
    answers: list[Mapping[str, Any]] = plugin_manager().hook.kernels_packs()  # the last one registered answers first
    return {name: make for answer in answers for name, make in answer.items()}


@dataclass(frozen=True)
class Pack:
    """The kernel of a pack for a layer name."""

    name: str
    layer_name: str

    def load(self, device: torch.device) -> Any:
        """Ask the pack for its kernel.

        Raises:
            LoadError: If it has none, or its plugin was blocked or unregistered since the mapping was parsed.
        """
        make = _packs().get(self.name)
        kernel = make(self.layer_name, device) if make is not None else None
        if kernel is None:
            problem = "it is not installed any more" if make is None else f"it has no kernel for {self.layer_name!r}"
            raise LoadError(f"pack {self.name!r}: {problem} on {device.type}")
        return kernel

    def __repr__(self) -> str:
        return f"{PREFIX}{self.name}:{self.layer_name}"


def as_pack(text: str, where: str, layer_name: str) -> Pack:
    """Parse the text of a source; `layer_name` is that of the mapping, empty where there is none.

    Raises:
        ArgumentError: If there is no such pack, or the text names no layer.
    """
    name, colon, named = text.removeprefix(PREFIX).partition(":")
    packs = _packs()
    if name not in packs:
        raise ArgumentError(
            f"In the mapping of {where}: there is no pack {name!r}: there are {', '.join(sorted(map(str, packs)))}. "
            "Packs are offered by plugins, which KERNELS_PLUGINS may leave out."
        )
    chosen = named if colon else layer_name
    if not chosen:
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} names no layer: write 'pack:{name}:LAYER', such as "
            f"'pack:{name}:RMSNorm'."
        )
    return Pack(name, chosen)
