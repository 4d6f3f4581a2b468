"""`agree`: the ranks of a process group compare their decisions, and leave kernels that failed on one of them."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn

from ..device import Device, as_torch_device
from ..errors import ArgumentError, ArgumentTypeError, DisagreementError, KernelsError
from ..guards.limits import unlimited
from ..guards.quarantine import Quarantined, agreed, apply, quarantine, quarantined
from ..layer import Layer, source_label
from ..mode import Mode
from ..models.modules import device_of
from ..models.receipt import Receipt, receipt
from ..raised import error_text
from ..resolution import Resolution
from ..table import folded, indented
from ..warning import warn_once
from .decision import Decision, alike, decisions_of, differences, digest_of
from .freezing import serving
from .group import RankGroup

TIMEOUT = 600.0
"""Seconds that ranks wait for each other: others may still download a kernel."""

_MOST = 64
"""Different reports that ranks exchange in full; ranks with others are only counted."""

_PLACES = 30
"""Places in the model, such as `layers.0-23.norm`, that a message lists."""


def agree(
    model: nn.Module,
    *,
    device: str | torch.device | Device | None = None,
    mode: Mode | None = None,
    group: Any = None,
    on_difference: Literal["raise", "warn"] = "raise",
    timeout: float = TIMEOUT,
) -> Receipt:
    """Compare the decisions of all ranks of a process group: all run the same kernels, or each raises the difference.

    Of the model, the decorated layers and functions are compared, as its receipt lists them, and nothing else.
    Every rank of the group calls this, at the same place of its program. Where all agree, it costs one collective of 32
    bytes. First, kernels that went into quarantine on one rank are taken out on all of them. From then on, a kernel
    that fails on one rank stays until the next `agree`: call it between steps, after the same steps on every rank.

    Args:
        model: The model, or the part of it that all ranks of the group have; it is not changed.
        device: The device of the calls, as for `receipt`.
        mode: The mode of the calls, as for `receipt`.
        group: A process group, or a device mesh of one dimension; all ranks of the job by default.
        on_difference: `"warn"` for ranks that may run different kernels, as with data parallelism: every rank issues
            the same warning.
        timeout: Seconds that ranks wait for each other in each of their exchanges.

    Returns:
        The receipt of this rank.

    Raises:
        ArgumentError: If there is no process group, or this rank is not in it, or as `receipt`.
        ArgumentTypeError: If an argument has the wrong type.
        DisagreementError: If ranks decide differently: on every rank with the same text, which names layers, ranks,
            implementations and reasons. Also if a rank failed, or did not answer in time.

    Example:
        >>> agree(nn.Linear(2, 2), device="cpu", mode=Mode.INFERENCE)
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Ranks can only agree in a process group, and there is none: ...
    """
    ranks = group_of(model, device, group, timeout)

    def make() -> Receipt:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"Ranks agree on an nn.Module, not {model!r}.")
        if on_difference not in ("raise", "warn"):
            raise ArgumentError(f"on_difference is 'raise' or 'warn', not {on_difference!r}.")
        return receipt(model, device=device, mode=mode)

    return reach(ranks, make, warns=on_difference == "warn")


def group_of(model: Any, device: Any, group: Any, timeout: float) -> RankGroup:
    """Return the ranks of a group that a caller has given; tensors go over the device of a model.

    Says nothing of a wrong model or device: `reach` does, on all ranks. A rank that raised here would leave the others
    waiting, and its next exchange would answer the one that they wait for.
    """
    where = None
    with contextlib.suppress(KernelsError):
        where = as_torch_device(device) if device is not None else device_of(model)
    return RankGroup.of(group, where, timeout)


def reach(ranks: RankGroup, make: Callable[[], Receipt], *, warns: bool = False) -> Receipt:
    """Compare the receipts that all ranks of a group make, after they have taken out the same kernels.

    Args:
        ranks: The group.
        make: Makes the receipt of this rank; called again once kernels went into quarantine.
        warns: Whether a difference is a warning.

    Raises:
        DisagreementError: As `agree`.
        Exception: The error of `make`, where it fails on this rank; on the others, that is a disagreement.
    """
    # Every rank takes the same way through this: it depends only on what all of them have exchanged.
    # Twice at most: what is decided after kernels were taken out may differ, and is compared, too.
    for first in (True, False):
        mine = _Report.make(make, with_quarantine=first)
        digests = ranks.gather(mine.digest)
        same = alike(digests)
        found = [(list(range(len(digests))), mine)] if same else _exchange(ranks, digests, mine)
        if mine.error is not None:  # not before the exchange: the other ranks are waiting in it
            raise mine.error
        if failed := [f"{ranks.name(who)}: {report.failure}" for who, report in found if report.failure]:
            raise DisagreementError(
                "\n".join(["Ranks cannot agree, for one of them failed. No model was changed.", *indented(failed)])
            )
        if _take_out(ranks, mine, found):  # on all ranks, also where this one had none to take out
            continue
        differing = [] if same else list(differences((who, report.decisions) for who, report in found))
        if not differing:
            if len(digests) > 1:  # from here on, a quarantine waits for the other ranks; a single rank has none
                agreed.update(layer for layer in map(_layer, mine.decided) if layer is not None)
            break
        text = _described(ranks, differing, len(digests) - sum(len(who) for who, _ in found))
        if not warns:
            raise DisagreementError(text, layers=[path for path, _ in differing])
        warn_once(text)
        break
    assert mine.receipt is not None
    return mine.receipt


@dataclass
class _Report:
    """The decisions of one rank, or the reason why it could not decide."""

    receipt: Receipt | None = None
    error: Exception | None = None
    failure: str = ""
    decisions: list[Decision] = field(default_factory=list)
    entries: list[Quarantined] = field(default_factory=list)
    """The kernels of the model that are in quarantine; those that wait for this are applied by it."""
    out: dict[tuple[str, ...], tuple[str, bool]] = field(default_factory=dict)
    """The reason of each such entry by its key, and whether it waits."""

    @classmethod
    def make(cls, make: Callable[[], Receipt], *, with_quarantine: bool) -> _Report:
        try:
            receipt = make()
            decisions = decisions_of(receipt)
        except Exception as error:  # reported to the other ranks, which wait for this one
            return cls(error=error, failure=error_text(error))
        report = cls(receipt, decisions=decisions)
        if with_quarantine:
            layers = {(layer.name, layer.qualname) for layer in map(_layer, report.decided) if layer is not None}
            concerned = (e for e in quarantined() if not e.layer_name or (e.layer_name, e.layer) in layers)
            report.entries = sorted(concerned, key=lambda entry: entry.key)
            report.out = {entry.key: (entry.reason, entry.is_waiting) for entry in report.entries}
        return report

    @property
    def decided(self) -> list[Resolution]:
        return list({id(one): one for one, _ in self.receipt._grounds.decided}.values()) if self.receipt else []

    @property
    def digest(self) -> bytes:
        return digest_of(self.decisions, (self.failure, [(key, waits) for key, (_, waits) in self.out.items()]))

    def packed(self) -> bytes:
        out = [[*key, *about] for key, about in self.out.items()]
        value = {"failure": self.failure, "decisions": [asdict(each) for each in self.decisions], "out": out}
        return zlib.compress(json.dumps(value).encode())

    @classmethod
    def unpack(cls, packed: bytes) -> _Report:
        value = json.loads(zlib.decompress(packed))
        decisions = [Decision(**{**each, "remarks": tuple(each["remarks"])}) for each in value["decisions"]]
        out = {tuple(key): (reason, waits) for *key, reason, waits in value["out"]}
        return cls(failure=value["failure"], decisions=decisions, out=out)


def _layer(resolution: Resolution) -> Layer | None:
    return resolution.request.layer


def _exchange(ranks: RankGroup, digests: list[bytes], mine: _Report) -> list[tuple[list[int], _Report]]:
    """Return the reports of all ranks: one for those with equal digests, with their places in the group."""
    alike: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        alike.setdefault(digest, []).append(number)
    # Of equal reports, one is sent: a thousand ranks mostly have two different ones.
    sent = list(alike.values())[:_MOST]
    return [(numbers, _Report.unpack(ranks.send(mine.packed(), numbers[0]))) for numbers in sent]


def _take_out(ranks: RankGroup, mine: _Report, found: list[tuple[list[int], _Report]]) -> bool:
    """Apply the quarantines of all ranks on this one; return whether any rank had to."""
    outs = [report.out for _, report in found]
    waiting = any(waits for out in outs for _, waits in out.values())
    if not waiting and all(out.keys() == outs[0].keys() for out in outs):
        return False
    apply(mine.entries)
    # All of them before any is excluded: each exclusion changes the decisions that are asked for here.
    serving_now = [each for one in mine.decided for each in serving(one)]
    for key in sorted({key for out in outs for key in out} - mine.out.keys()):
        who, reason = next((who, report.out[key][0]) for who, report in found if key in report.out)
        name, place, kernel, device, mode, dtype = key
        more: dict[str, Any] = {
            "reason": f"on {ranks.name(who)}, {reason}",
            "mode": Mode(int(mode)) if mode else None,
            "dtype": getattr(torch, dtype) if dtype else None,
            "now": True,  # not at the next `agree`: this is it
        }
        if not name:
            quarantine(kernel, device=device or None, **more)
        for one in serving_now:
            layer, implementation = one.request.layer, cast(Any, one.implementation)
            names = (one.origin, source_label(unlimited(implementation)))
            if layer is not None and (layer.name, layer.qualname) == (name, place) and kernel in names:
                where = one.request.device if device else None  # the key has no index: ranks have others
                quarantine(layer, implementation, kernel=kernel, device=where, **more)
    return True


def _described(
    ranks: RankGroup, differing: Iterable[tuple[str, list[tuple[list[int], Decision | None]]]], left_out: int
) -> str:
    """Return the text of a disagreement: the same on every rank."""
    items = []
    for path, here in differing:
        groups: dict[str, tuple[list[int], Decision | None]] = {}
        for numbers, decision in here:
            served = str(decision) if decision is not None else "they have no such layer"
            groups.setdefault(served, ([], decision))[0].extend(numbers)
        lines = []
        for served, (numbers, decision) in groups.items():
            lines.append(f"{ranks.name(sorted(numbers))}: {served}")
            lines += indented(decision.remarks if decision is not None else ())
        layer = next(decision.layer for _, decision in here if decision is not None)
        items.append((path, (layer, *lines), (layer, lines)))
    text = [f"The {len(ranks.ranks)} ranks of a process group would run different kernels. No model was changed."]
    places = folded(items)
    for path, (layer, lines) in places[:_PLACES]:
        text += [f"  {path or 'the model'} (layer {layer!r}):", *indented(lines)]
    if len(places) > _PLACES:
        text.append(f"  and {len(places) - _PLACES} more places")
    if left_out:
        text.append(f"  {left_out} more ranks differ from all of these")
    text.append(
        "In brackets: the hash of its files or its code. Give all ranks the same model, plugins, mappings, environment "
        "and commits; `kernels-core freeze` writes a file that pins them. Where ranks may run different kernels, as "
        "with data parallelism, call agree(..., on_difference='warn')."
    )
    return "\n".join(text)
