"""`Decision`: the kernels of one layer of a model on one rank, as ranks compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ..models.receipt import Receipt
from ..models.receipt_row import ReceiptRow
from ..resolution import Resolution
from ..table import as_json
from .content import content_of, in_program
from .freezing import serving
from .frozen import hardware


@dataclass(frozen=True)
class Decision:
    """The kernels of a layer, without details that differ between ranks that run the same: indices of devices, reasons.

    Attributes:
        path: Where it is in the model, without the names of wrappers; all its paths, if it is shared.
        layer: The layer name.
        mode: The mode in words.
        hardware: The type of the device, and its compute capability.
        served: The kernels with the hashes of their content, and the calls that each is offered for; or `"reference"`.
        shared: The same as it has to be on ranks with other hardware: a build variant is left out.
        remarks: The reasons for it.
    """

    path: str
    layer: str
    mode: str
    hardware: str
    served: str
    shared: str
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """Name the kernels, the mode and the hardware."""
        return f"{self.served} for {self.mode} on {self.hardware}"


def decisions_of(receipt: Receipt) -> list[Decision]:
    """Return the decisions of a receipt, which this process has made."""
    found = []
    known: dict[int, tuple[str, str, str]] = {}  # by decision: a model has many modules of one layer
    for resolution, row in receipt._grounds.decided:
        if id(resolution) not in known:
            kind, capability = hardware(resolution.request.device)
            where = kind if capability is None else f"{kind} {capability / 10}"
            known[id(resolution)] = where, *_served(resolution)
        where, served, shared = known[id(resolution)]
        if row.origin != resolution.origin:  # such as the reference, where the condition of the layer is not met
            served = shared = row.origin
        path = " = ".join((row.path, *row.aliases))
        found.append(Decision(path, row.layer_name, row.mode, where, served, shared, _remarks(row)))
    return found


def _remarks(row: ReceiptRow) -> tuple[str, ...]:
    offered = f"offered by plugin {row.plugin!r}"
    return (offered, *row.remarks) if row.plugin else tuple(row.remarks)


def _served(first: Resolution) -> tuple[str, str]:
    exact, shared = [], []
    for resolution in serving(first):
        record = as_json(resolution.candidate.record, indent=None) if resolution.candidate is not None else "null"
        calls = "" if record == "null" else f" for the calls {in_program(record)}"
        content = resolution.loaded_content or content_of(
            resolution.kernel_layer or resolution.implementation, on_any_rank=True
        )
        origin, content = in_program(resolution.origin), content[:12]
        exact.append(f"{origin}{f' [{content}]' if content else ''}{calls}")
        from_hub = resolution.provenance.get("commit")
        shared.append(f"{resolution.provenance['repository']}@{from_hub}{calls}" if from_hub else exact[-1])
    return ", then ".join(exact) or "reference", ", then ".join(shared) or "reference"


def digest_of(decisions: Iterable[Decision], more: object = None) -> bytes:
    """Return 32 bytes by which ranks compare all their decisions; see `alike`.

    Args:
        decisions: The decisions of this rank.
        more: What else must be the same on all ranks.
    """
    decisions = list(decisions)
    shared = [(each.path, each.layer, each.mode, each.shared) for each in decisions]
    exact = [(each.path, each.served) for each in decisions]
    kinds = sorted({each.hardware for each in decisions})
    # Other hardware may have other builds: so ranks of one kind of hardware find each other by four bytes.
    return _hash((shared, more), 12) + _hash(kinds, 4) + _hash(exact, 16)


def _hash(value: object, size: int) -> bytes:
    return hashlib.sha256(repr(value).encode(errors="replace")).digest()[:size]


def alike(digests: Iterable[bytes]) -> bool:
    """Whether ranks with these digests decide alike: all share the first part, and those with equal hardware the rest.

    Example:
        >>> one = digest_of([Decision("norm", "Norm", "inference", "cpu", "acme.Norm", "acme.Norm")])
        >>> len(one), alike([one, one]), alike([one, digest_of([])])
        (32, True, False)
    """
    distinct = set(digests)
    return len({each[:12] for each in distinct}) == 1 and len({each[12:16] for each in distinct}) == len(distinct)


Who = TypeVar("Who")


def differences(found: Iterable[tuple[Who, list[Decision]]]) -> Iterator[tuple[str, list[tuple[Who, Decision | None]]]]:
    """Yield the paths at which ranks differ, each with the decision of every rank; None where it has no such layer.

    Args:
        found: The decisions of ranks, with the ranks that have them.
    """
    by_ranks = [(who, {each.path: each for each in decisions}) for who, decisions in found]
    for path in dict.fromkeys(path for _, decisions in by_ranks for path in decisions):
        here = [(who, decisions.get(path)) for who, decisions in by_ranks]
        shared = {each and (each.layer, each.mode, each.shared) for _, each in here}
        exact = {each and (each.hardware, each.served) for _, each in here}
        if len(shared) > 1 or len(exact) > len({each and each.hardware for _, each in here}):
            yield path, here
