"""A receipt: the kernel that serves each layer of a model, its origin, and why each other one does not."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .. import resolver
from ..answer import not_taken
from ..device import Device, as_torch_device
from ..errors import ArgumentTypeError, RequirementError
from ..generated import dispatched_layer
from ..guards.parts import for_module
from ..layer import Layer
from ..mode import Mode, check_call_mode
from ..plugins import plugin_manager
from ..resolution import Refusal, Resolution
from ..table import Table, TableRow, Tabular, as_json, indented
from .counting import calls_of
from .frozen import foreign_forward, frozen_choice
from .functions import called_by, functions_of
from .modules import device_of, locate, module_paths, required_device

COLUMNS = ("path", "layer", "device", "mode", "origin", "plugin", "calls")


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

    @property
    def is_reference(self) -> bool:
        """Whether the layer's own forward serves."""
        return self.origin == "reference"

    @property
    def remarks(self) -> Iterator[str]:
        """The reasons for the decision, a line each."""
        if self.note:
            yield self.note
        yield from (f"refused {candidate}: {reason}" for candidate, reason in self.refusals)
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
            **more,
        )


def _reasons(refusals: Iterable[Refusal]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (refusal.candidate.label if refusal.candidate else f"plugin {refusal.plugin!r}", refusal.reason)
        for refusal in refusals
    )


def _together(rows: Iterable[ReceiptRow]) -> list[ReceiptRow]:
    """Return the rows with one for layers that are served alike, at paths such as `layers.0-23.mlp`.

    The last number of their paths is folded first, so that `layers.0-23.experts.0-7` is one row, too.
    """
    keyed = [((*row.cells[1:], *row.remarks), re.split(r"(?<![^.])(\d+)(?![^.:])", row.cells[0]), row) for row in rows]
    for back in range(1, max((len(parts) for _, parts, _ in keyed), default=0), 2):
        groups: dict[object, list[tuple[tuple[str, ...], list[str], ReceiptRow]]] = {}
        for each in keyed:
            key, parts, _ = each
            number = len(parts) - 1 - back
            alike = (key, *parts[:number], *parts[number + 1 :]) if number > 0 else id(each)
            groups.setdefault(alike, []).append(each)
        keyed = []
        for group in groups.values():
            key, parts, row = group[0]
            number = len(parts) - 1 - back
            if len(group) > 1:
                parts = [*parts[:number], _ranges(p[number] for _, p, _ in group), *parts[number + 1 :]]
            keyed.append((key, parts, row))
    return [replace(row, path="".join(parts), aliases=()) for _, parts, row in keyed]


def _ranges(numbers: Iterable[str]) -> str:
    """Write numbers shortly: `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


@dataclass(frozen=True)
class Receipt(Tabular):
    """The kernel or reference that serves each decorated layer of a model.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        rows: A row for each layer, in the order of the model.
    """

    rows: tuple[ReceiptRow, ...]

    def require(self, pattern: str, origin: str | None = None) -> Receipt:
        """Raise unless the layers at some paths are served as wanted.

        Args:
            pattern: A glob over paths, such as `"model.layers.*.mlp"`; `*` also matches dots.
            origin: A glob over origins, such as `"kernels-community/*"`; None for anything but the
                reference.

        Returns:
            The receipt itself, for the next requirement.

        Raises:
            RequirementError: If a layer is served otherwise, with the reason for each, or if no path
                matches.

        Example:
            >>> Receipt(()).require("layers.*")
            Traceback (most recent call last):
            ...
            kernels_core.RequirementError: No decorated layer matches 'layers.*': ...
        """
        for glob in (pattern,) if origin is None else (pattern, origin):
            if not isinstance(glob, str):
                raise ArgumentTypeError(f"require takes globs such as 'layers.*', not {glob!r}.")
        matching = [row for row in self.rows if any(fnmatchcase(path, pattern) for path in (row.path, *row.aliases))]
        if not matching:
            paths = [path for row in self.rows for path in (row.path, *row.aliases)]
            near = difflib.get_close_matches(pattern, paths, 3, 0.3) or paths[:3]
            known = f"there are {len(paths)}, such as {', '.join(map(repr, near))}" if paths else "there is none at all"
            raise RequirementError(f"No decorated layer matches {pattern!r}: {known}.", rows=())
        wanted = "a kernel" if origin is None else f"origin {origin!r}"
        failing = [
            row for row in matching if (row.is_reference if origin is None else not fnmatchcase(row.origin, origin))
        ]
        if failing:
            lines = [
                f"{len(failing)} of {len(matching)} layers that match {pattern!r} are not served by {wanted}:",
                *(line for row in _together(failing) for line in row.described),
                *(f"A plugin failed, and may have had a kernel: {fault}" for fault in plugin_manager().faults),
                "Offer a kernel that fits, correct the reasons above, or require less. `kernels-core plugins` lists "
                "who offers kernels.",
            ]
            raise RequirementError("\n".join(lines), rows=failing)
        return self

    def diff(self, other: Receipt) -> ReceiptDiff:
        """Return the differences of another receipt from this one.

        Example:
            >>> bool(Receipt(()).diff(Receipt(())))
            False
        """
        if not isinstance(other, Receipt):
            raise ArgumentTypeError(f"diff takes another receipt, not {other!r}.")
        mine, theirs = ({row.path: row for row in receipt.rows} for receipt in (self, other))
        both = [(row, theirs[path]) for path, row in mine.items() if path in theirs]
        return ReceiptDiff(
            changed=tuple((before, after) for before, after in both if _served(before) != _served(after)),
            added=tuple(row for path, row in theirs.items() if path not in mine),
            removed=tuple(row for path, row in mine.items() if path not in theirs),
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON: a list of rows.

        Example:
            >>> Receipt(()).to_json()
            '[]'
        """

        def listed(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
            return [{"candidate": candidate, "reason": reason} for candidate, reason in pairs]

        rows = [{**vars(row), "refusals": listed(row.refusals), "misfits": listed(row.misfits)} for row in self.rows]
        return as_json(rows, indent=indent)

    def as_table(self) -> Table:
        """Return the rows with their reasons: green where a kernel serves, yellow where the reference does."""
        if not self.rows:
            return Table(COLUMNS, summary="no decorated layer")
        shown = len(COLUMNS) - all(row.calls is None for row in self.rows)  # the last column is that of calls
        rows = [
            TableRow(row.cells[:shown], "yellow" if row.is_reference else "green", tuple(row.remarks))
            for row in _together(self.rows)
        ]
        return Table(COLUMNS[:shown], rows)


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
            lines += [f"~ {before.path}: {_served(before)} -> {_served(after)}", *indented(after.remarks)]
        lines += [f"+ {row.path}: {_served(row)}" for row in self.added]
        lines += [f"- {row.path}: {_served(row)}" for row in self.removed]
        return "\n".join(lines) or "no difference"


def _served(row: ReceiptRow) -> str:
    return f"{row.origin} on {row.device} for {row.mode}"


# --- Looking at a model --------------------------------------------------------------------------


def receipt(
    model: nn.Module,
    *,
    device: str | torch.device | Device | None = None,
    mode: Mode | None = None,
) -> Receipt:
    """Return the kernel that serves each decorated layer of a model, its origin, and why each other one does not.

    Decides as a call would, without running anything: it may download and import kernels.

    Args:
        model: The model; it is not changed.
        device: The device of the calls, such as `"cuda"`; by default, that of each module's own
            parameters.
        mode: The mode of the calls; by default `Mode.TRAINING` for a model in training mode, else
            `Mode.INFERENCE`. Choices of `kernelize` keep the mode and device that they were made for.

    Returns:
        A row for each decorated layer, and for each decorated function that a module declares
        (`use_kernelized_func`), holds in an attribute, or names in the code that serves it: it may call that.

    Raises:
        ArgumentError: If device or mode cannot be those of a call, or the model has no tensor on any device.
        ArgumentTypeError: If `model` is no module.

    Example:
        >>> @use_kernel_forward_from_hub("Identity")
        ... class Identity(nn.Module):
        ...     def forward(self, x):
        ...         return x
        >>> (row,) = receipt(nn.Sequential(Identity()), device="cpu").rows
        >>> row.path, row.layer_name, row.origin
        ('0', 'Identity', 'reference')
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"receipt takes an nn.Module, not {model!r}.")
    given = as_torch_device(device) if device is not None else None
    inferred = given or device_of(model)
    chosen = check_call_mode(mode) if mode is not None else Mode.TRAINING if model.training else Mode.INFERENCE
    where = locate(model, inferred) if given is None and inferred is not None else {}
    known: dict[tuple[Layer, torch.device], Resolution] = {}

    def decide(layer: Layer, module: nn.Module) -> Resolution:
        key = (layer, given or where.get(id(module)) or required_device(model, "receipt"))
        if key not in known:
            known[key] = resolver.decide(*key, (chosen,))
        return known[key]

    called = functools.cache(called_by)
    found = [pair for module, places in module_paths(model).items() for pair in _rows(places, module, decide, called)]
    calls = calls_of([counted for counted, _ in found])
    return Receipt(
        tuple(
            # Calls in compiled code are not counted: that none was is not known.
            replace(row, calls=count if count or "compile" not in row.mode else None)
            for (_, row), count in zip(found, calls, strict=True)
        )
    )


def _rows(
    places: Sequence[str],
    module: nn.Module,
    decide: Callable[[Layer, nn.Module], Resolution],
    called: Callable[..., Sequence[Layer]],
) -> Iterator[tuple[nn.Module | Layer, ReceiptRow]]:
    """Yield the row of a module, if it is decorated, and those of the functions that it calls, each with its caller."""
    frozen = frozen_choice(module)
    original = type(module) if frozen is None else frozen.original
    if frozen is not None and not frozen.serves(module):
        frozen = None  # suspended, or its kernel is in quarantine: calls decide by themselves
    layer, forward = dispatched_layer(original.forward), original.forward
    if layer is not None:
        resolution = frozen.resolution if frozen is not None else None
        if resolution is None and layer.condition is not None and not layer.condition(module):
            resolution = Resolution(decide(layer, module).request, note="its condition is not met")
        resolution = for_module(resolution or decide(layer, module), module)
        if (foreign := foreign_forward(module)) is not None:
            note = f"{foreign} runs, which was put on the module as its forward, and may call this one"
            resolution = replace(resolution, note="; ".join(filter(None, (resolution.note, note))))
        forward = resolution.implementation or layer.reference
        yield module, ReceiptRow.of(resolution, *places, frozen=frozen is not None)
    for function in dict.fromkeys((*functions_of(module), *called(forward, original))):
        kept = frozen.functions.get(function) if frozen is not None else None
        chosen = kept or decide(function, module)
        names = [f"{place}:{function.reference.__name__}" for place in places]
        yield function, ReceiptRow.of(chosen, *names, frozen=kept is not None)
