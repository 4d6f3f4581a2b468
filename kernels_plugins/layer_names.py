"""Layer names in mappings and orders of packs: globs, which match no layer, and names that are misspelt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain

from kernels_core import ArgumentError, Candidate, Cause, LayerRequest, Refusal, plugin_manager


def rule_layers() -> list[str]:
    """Return the layer names of all rules by which models are adopted."""
    names = set()
    for rule in chain(*(offered for _, offered in plugin_manager().hook.kernels_adoption_rules())):
        with contextlib.suppress(AttributeError):  # `adopt` reports one that is no rule
            names.add(str(rule.layer_name))
    return sorted(names)


def check_layer_name(name: str) -> None:
    """Raise `ArgumentError` for a glob: it would match no layer, and no call would tell."""
    if "*" in name or "?" in name:
        near = [layer for layer in rule_layers() if fnmatchcase(layer, name)]
        each = f", such as {', '.join(near)}" if near else ""
        raise ArgumentError(
            f"{name!r} is a glob, and matches no layer: write an entry for each layer name{each}. Only the setting "
            'packs has "*", for all layers of adopted models.'
        )


def misspelt_for(request: LayerRequest, like: Candidate, names: Iterable[str]) -> list[Candidate | Refusal]:
    """Return a refusal for a mapping that names no such layer, and has nearly that name: receipts show it."""
    if (near := misspelt(request.layer_name, names)) is None:
        return []
    reason = f"it is mapped, and this layer is {request.layer_name!r}: correct the mapping if that is meant"
    return [Refusal(reason, replace(like, source=near), like.plugin, cause=Cause.POLICY)]


def misspelt(name: str, names: Iterable[str]) -> str | None:
    """Return the first of some names that differs from a name by letters in another order, by one, or by case.

    Not by the first or the last one, by a digit, or by one of a few, for `q_norm`, `k_norm` and `qk_norm` are three
    layers, as are GLU and GELU; and the name of a function is never nearly that of a class.
    """
    near = (other for other in names if other != name and other.islower() is name.islower())
    return next((other for other in near if _are_near(_plain(name), _plain(other))), None)


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


def _are_near(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    if one == other or short[:1] != long[:1] or short[-1:] != long[-1:]:
        return one == other
    if len(short) == len(long):
        return sorted(short) == sorted(long)
    left_out = (at for at in range(1, len(long) - 1) if not long[at].isdigit())
    return 5 < len(short) == len(long) - 1 and any(long[:at] + long[at + 1 :] == short for at in left_out)
