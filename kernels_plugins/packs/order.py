"""`PackOrder`: the setting `packs`, which packs serve a layer name, in which order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kernels_core import Candidate, Cause, ConfigSection, LayerRequest, Reference, Refusal

from ..adoption.classes import adopted_rule
from ..layer_names import check_layer_name, misspelt_for
from .source import PREFIX, Pack, as_pack

EVERY = "*"
"""In place of a layer name: all layers of adopted models."""


@dataclass(frozen=True, eq=False)
class PackOrder:
    """The names of packs, or `"reference"`, for each layer name."""

    order: Mapping[str, tuple[str, ...]]

    def offers(self, request: LayerRequest, like: Candidate) -> list[Candidate | Refusal]:
        """Return candidates like `like`; for `"*"`, packs without a kernel are inapplicable, without a warning."""
        if request.layer_name in self.order:
            return [replace(like, source=source) for source in self.sources(request.layer_name)]
        near = misspelt_for(request, like, self.order)
        if EVERY not in self.order or adopted_rule(request.layer) is None:
            return near
        # Asks packs before there is a candidate: one that has no kernel would be refused with a warning for each layer.
        offers = near
        for name in self.order[EVERY]:
            candidate = replace(like, source=self._source(name, request.layer_name))
            reason = lack(name, request.layer_name, request.device) if candidate.source is not Reference else ""
            offers.append(Refusal(reason, candidate, like.plugin, cause=Cause.DEVICE) if reason else candidate)
        return offers

    def sources(self, layer_name: str) -> list[object]:
        """Return the sources of a layer name in the order."""
        return [self._source(name, layer_name) for name in self.order[layer_name]]

    @staticmethod
    def _source(name: str, layer_name: str) -> object:
        return Reference if name == "reference" else Pack(name, layer_name)


@functools.lru_cache(maxsize=1024)
def lack(name: str, layer_name: str, device: torch.device) -> str:
    """Return why a pack has no kernel for a layer on a device; nothing if it has one."""
    try:
        Pack(name, layer_name).load_on(device)
    except Exception as error:  # a library that is not there, or is broken
        return str(error) or type(error).__name__
    return ""


def parse_order(section: ConfigSection) -> PackOrder:
    """Parse `packs` of a configuration file."""
    lack.cache_clear()  # the file is read again where plugins have changed
    order: dict[str, tuple[str, ...]] = {}
    for layer_name, packs in section.as_table().items():
        if layer_name != EVERY:
            with packs.blamed():
                check_layer_name(layer_name)
        names = []
        for item in packs.as_list():
            name = item.as_text().removeprefix(PREFIX)
            with item.blamed():
                if name != "reference":
                    as_pack(f"{PREFIX}{name}", f"layer {layer_name!r}", layer_name)
            names.append(name)
        order[layer_name] = tuple(names)
    return PackOrder(order)
