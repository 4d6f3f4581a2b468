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

    def load_on(self, device: torch.device) -> Any:
        """Ask the pack for its kernel.

        Raises:
            LoadError: If it has none, or the plugin of the pack is blocked, or was unregistered.
        """
        make = _packs().get(self.name)
        kernel = make(self.layer_name, device) if make is not None else None
        if kernel is None:
            problem = f"it has no kernel for {self.layer_name!r} on {device.type}"
            if make is None:
                problem = (
                    "no plugin offers it: KERNELS_PLUGINS or a configuration file leaves it out, or it was unregistered"
                )
            raise LoadError(f"pack {self.name!r}: {problem}")
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
    if name not in packs and plugin_manager().allows(name):  # or KERNELS_PLUGINS would make a program raise
        known = ", ".join(sorted(map(str, packs))) or "none"
        raise ArgumentError(f"In the mapping of {where}: there is no pack {name!r}: there are {known}.")
    chosen = named if colon else layer_name
    if not chosen:
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} names no layer: write 'pack:{name}:LAYER', such as "
            f"'pack:{name}:RMSNorm'."
        )
    return Pack(name, chosen)
