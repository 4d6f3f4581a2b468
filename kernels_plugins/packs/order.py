"""`PackOrder`: the setting `packs`, which packs serve a layer name, in which order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kernels_core import Candidate, Cause, ConfigSection, LayerRequest, Reference, Refusal

from ..adoption.classes import adopted_rule
from .source import PREFIX, Pack, as_pack

EVERY = "*"
"""In place of a layer name: all layers of adopted models."""


@dataclass(frozen=True, eq=False)
class PackOrder:
    """The names of packs, or `"reference"`, for each layer name."""

    order: Mapping[str, tuple[str, ...]]

    def offers(self, request: LayerRequest, like: Candidate) -> list[Candidate | Refusal]:
        """Return candidates like `like`; for `"*"`, packs without a kernel are inapplicable, without a warning."""
        names = self.order.get(request.layer_name)
        if names is not None:
            sources = [self._source(name, request.layer_name) for name in names]
            return [replace(like, source=source) for source in sources]
        if EVERY not in self.order or adopted_rule(request.layer) is None:
            return []
        # Asks packs before there is a candidate: one that has no kernel would be refused with a warning for each layer.
        offers: list[Candidate | Refusal] = []
        for name in self.order[EVERY]:
            candidate = replace(like, source=self._source(name, request.layer_name))
            reason = _lack(name, request.layer_name, request.device) if candidate.source is not Reference else ""
            offers.append(Refusal(reason, candidate, like.plugin, cause=Cause.DEVICE) if reason else candidate)
        return offers

    @staticmethod
    def _source(name: str, layer_name: str) -> object:
        return Reference if name == "reference" else Pack(name, layer_name)


@functools.lru_cache(maxsize=1024)
def _lack(name: str, layer_name: str, device: torch.device) -> str:
    """Return why a pack has no kernel for a layer on a device; nothing if it has one."""
    try:
        Pack(name, layer_name).load_on(device)
    except Exception as error:  # a library that is not there, or is broken
        return str(error) or type(error).__name__
    return ""


def parse_order(section: ConfigSection) -> PackOrder:
    """Parse `packs` of a configuration file."""
    _lack.cache_clear()  # the file is read again where plugins have changed
    order: dict[str, tuple[str, ...]] = {}
    for layer_name, packs in section.as_table().items():
        names = []
        for item in packs.as_list():
            name = item.as_text().removeprefix(PREFIX)
            with item.blamed():
                if name != "reference":
                    as_pack(f"{PREFIX}{name}", f"layer {layer_name!r}", layer_name)
            names.append(name)
        order[layer_name] = tuple(names)
    return PackOrder(order)
