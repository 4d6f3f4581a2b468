"""The row of a receipt: one layer of a model, and why it is served as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..answer import not_taken
from ..guards.numerics import NUMERICS
from ..resolution import Refusal, Resolution
from ..table import folded, indented

BYPASSED = "bypassed"
"""The origin of layers that are not called."""


@dataclass(frozen=True)
class ReceiptRow:
    """One layer of a model.

    Attributes:
        path: Where it is in the model, as in `module_paths`; for a decorated function that a module calls,
            the module's path, a colon, and the function's name.
        layer_name: The name that mappings use.
        layer: Where the layer is defined.
        device: The device of the decision.
        mode: The mode of the decision.
        implementation: The function that is called.
        origin: Where it comes from: repository and commit, class, or `"reference"`.
        plugin: The plugin that offered it.
        refusals: Candidate and reason, for each that was tried and refused.
        misfits: Candidate and reason, for each that is offered only for other calls.
        checked: The checks that it passed, with their results.
        note: Why no plugin was asked for candidates, where that is so; the calls that the kernel does not take.
        frozen: Whether `kernelize` made the decision.
        calls: The number of calls per origin, while calls were counted; None if no call of the model was, and for
            compiled code, whose calls are not.
        aliases: The other paths of a shared layer.
        bypasses: The paths of children, from that of the module, that the kernel computes in place of calling them.
        provenance: Who published the code that serves, and so on, as its loader knows it.
        content: A hash of the kernel, as `Resolution.content`; empty for the reference.
    """

    path: str
    layer_name: str
    layer: str
    device: str
    mode: str
    implementation: str
    origin: str
    plugin: str = ""
    refusals: tuple[tuple[str, str], ...] = ()
    misfits: tuple[tuple[str, str], ...] = ()
    checked: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    frozen: bool = False
    calls: Mapping[str, int] | None = None
    aliases: tuple[str, ...] = ()
    bypasses: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    content: str = ""

    @property
    def is_reference(self) -> bool:
        """Whether the layer's own forward serves."""
        return self.origin == "reference"

    @property
    def is_bypassed(self) -> bool:
        """Whether the layer is not called: a kernel of a module around it computes it."""
        return self.origin == BYPASSED

    @property
    def style(self) -> str:
        """The style of the row: green where a kernel serves, yellow where the reference does."""
        return "yellow" if self.is_reference else "dim" if self.is_bypassed else "green"

    @property
    def remarks(self) -> Iterator[str]:
        """The reasons for the decision, a line each."""
        if self.note:
            yield self.note
        if self.bypasses:
            yield f"bypasses {', '.join(self.bypasses)}"
        yield from (f"refused {candidate}: {reason}" for candidate, reason in self.refusals)
        yield from (f"{name}: {self.checked[name]}" for name in NUMERICS if name in self.checked)
        if self.is_reference:
            yield from (f"not for this call: {candidate}: {reason}" for candidate, reason in self.misfits)

    @property
    def described(self) -> Iterator[str]:
        """Path, layer name and origin, and the reasons, a line each."""
        yield f"  {self.path} (layer {self.layer_name!r}): {self.origin}"
        none = ["no kernel is offered for it"] if self.is_reference else []
        yield from indented(list(self.remarks) or none)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, one item per column."""
        calls = ", ".join(f"{count} {origin}" for origin, count in (self.calls or {}).items())
        if self.calls is not None and set(self.calls) <= {self.origin}:
            calls = str(sum(self.calls.values()))
        kept = " (frozen)" if self.frozen else ""
        path = " = ".join((self.path, *self.aliases))
        return (path, self.layer_name, self.device, self.mode, self.origin + kept, self.plugin, calls)

    @classmethod
    def of(cls, resolution: Resolution, path: str, *aliases: str, **more: Any) -> ReceiptRow:
        """Make the row of a decision."""
        request = resolution.request
        layer = request.layer
        function: Any = resolution.implementation or (layer.reference if layer else None)
        name = getattr(function, "__qualname__", repr(function))
        return cls(
            path=path,
            layer_name=request.layer_name,
            layer=layer.qualname if layer else "",
            device=str(request.device),
            mode=request.mode_text,
            implementation=f"{getattr(function, '__module__', '?')}.{name}",
            origin=resolution.origin,
            plugin=resolution.plugin,
            refusals=_reasons(resolution.refusals),
            misfits=_reasons(resolution.misfits),
            checked=dict(resolution.checked),
            note="; ".join(filter(None, (resolution.note, not_taken(resolution)))),
            aliases=aliases,
            provenance=resolution.provenance,
            content=resolution.content,
            **more,
        )


def with_bypassed(rows: Iterable[ReceiptRow]) -> Iterator[ReceiptRow]:
    """Yield rows; for layers that kernels of others compute, with that in place of the kernel that is not called."""
    rows = list(rows)
    skipped: dict[str, ReceiptRow] = {}
    for row in rows:
        for place in (row.path, *row.aliases) if row.bypasses else ():
            module = place.partition(":")[0]
            skipped.update((f"{module}.{part}".lstrip("."), row) for part in row.bypasses)

    def around(place: str) -> ReceiptRow | None:
        steps = place.partition(":")[0].split(".")
        return next(filter(None, (skipped.get(".".join(steps[:end])) for end in range(1, len(steps) + 1))), None)

    for row in rows:
        found = [around(place) for place in (row.path, *row.aliases)] if skipped else [None]
        if None in found:  # called at one of its places at least
            yield row
            continue
        other = found[0]
        assert other is not None
        note = f"{other.origin} computes it, which serves {other.layer_name!r}"
        yield replace(
            row,
            origin=BYPASSED,
            plugin="",
            refusals=(),
            misfits=(),
            checked={name: found for name, found in other.checked.items() if name in NUMERICS},
            note=note,
            bypasses=(),
            provenance={},
            content="",
        )


def _reasons(refusals: Iterable[Refusal]) -> tuple[tuple[str, str], ...]:
    """Return who was refused, and why: the candidate, a plugin as a whole, or all kernels, as by a wrong file."""
    return tuple(
        (
            one.candidate.label if one.candidate else f"plugin {one.plugin!r}" if one.plugin else "all kernels",
            one.reason,
        )
        for one in refusals
    )


def together(rows: Iterable[ReceiptRow]) -> list[ReceiptRow]:
    """Return the rows with one for layers that are served alike, at paths such as `layers.0-23.mlp`."""
    found = folded((row.cells[0], (*row.cells[1:], *row.remarks), row) for row in rows)
    return [replace(row, path=path, aliases=()) for path, row in found]


@dataclass(frozen=True)
class ReceiptDiff:
    """The differences between two receipts.

    Attributes:
        changed: Rows of one path whose origin, device or mode differs, before and after.
        added: Rows of paths that only the second one has.
        removed: Rows of paths that only the first one has.
    """

    changed: tuple[tuple[ReceiptRow, ReceiptRow], ...]
    added: tuple[ReceiptRow, ...]
    removed: tuple[ReceiptRow, ...]

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        """A line for each difference."""
        lines = []
        for before, after in self.changed:
            lines += [f"~ {before.path}: {served_in(before)} -> {served_in(after)}", *indented(after.remarks)]
        lines += [f"+ {row.path}: {served_in(row)}" for row in self.added]
        lines += [f"- {row.path}: {served_in(row)}" for row in self.removed]
        return "\n".join(lines) or "no difference"


def served_in(row: ReceiptRow) -> str:
    """Return the origin, device and mode of a row: two rows that differ in one of them differ."""
    return f"{row.origin} on {row.device} for {row.mode}"
