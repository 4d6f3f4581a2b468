"""A receipt: the kernel that serves each layer of a model, its origin, and why each other one does not."""

from __future__ import annotations

import difflib
import functools
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from .. import resolver
from ..decisions.file import DecisionFile
from ..decisions.freezing import Grounds
from ..device import Device, as_torch_device
from ..errors import ArgumentError, ArgumentTypeError, RequirementError, require_type
from ..exports import __version__
from ..generated import dispatched_layer
from ..guards.numerics import NUMERICS, UNKNOWN, Numeric, WantedNumerics
from ..guards.parts import for_module
from ..layer import Layer, source_label
from ..mode import Mode, check_call_mode
from ..pages.page import Page
from ..pages.receipt import receipt_page
from ..plugins import plugin_manager
from ..resolution import Resolution
from ..table import Table, TableRow, Tabular, as_json
from .choice import FrozenChoice
from .counting import calls_of
from .frozen import foreign_forward
from .functions import called_by, functions_of, held_by, names_of
from .modules import device_of, locate, module_paths, required_device
from .provenance import provenance_of
from .receipt_row import ReceiptDiff, ReceiptRow, served_in, together, with_bypassed

COLUMNS = ("path", "layer", "device", "mode", "origin", "plugin", "calls")


@dataclass(frozen=True)
class Receipt(Tabular):
    """The kernel or reference that serves each decorated layer of a model.

    `str` gives a plain table, `rich.print` one with colours, `to_html` a page to show around. Receipts are equal if
    their rows are.

    Attributes:
        rows: A row for each layer, in the order of the model.
        about: The model's class, the date and the versions, by name, as on the page.
        faults: The faults of plugins, which may have had kernels.
    """

    rows: tuple[ReceiptRow, ...]
    about: Mapping[str, str] = field(default_factory=dict, compare=False)
    faults: tuple[str, ...] = field(default=(), compare=False)
    _grounds: Grounds = field(default=Grounds(), compare=False, repr=False)

    def require(
        self,
        pattern: str,
        origin: str | None = None,
        *,
        deterministic: bool = False,
        batch_invariant: bool = False,
        recompute_equal: bool = False,
    ) -> Receipt:
        """Raise unless the layers at some paths are served as wanted.

        With a property of numbers and without an origin, a reference that has the property will do.

        Args:
            pattern: A glob over paths, such as `"model.layers.*.mlp"`; `*` also matches dots.
            origin: A glob over origins, such as `"kernels-community/*"`; None for anything but the
                reference.
            deterministic: Whether equal calls must give equal bits; not known, as all of these, before it was found
                out (`verify`, `numerics`).
            batch_invariant: Whether the bits of a row must not depend on other rows.
            recompute_equal: Whether recomputed and compiled forwards must give the same bits.

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
        asked = dict(zip(NUMERICS, (deterministic, batch_invariant, recompute_equal), strict=True))
        for name, one in asked.items():
            require_type(one, bool, name)
        names = [name for name, one in asked.items() if one]
        wanted = "" if names else "a kernel"
        wanted = wanted if origin is None else f"origin {origin!r}"
        wanted = " that is ".join(filter(None, (wanted or "anything", " and ".join(names))))
        found = [
            replace(row, checked={**dict.fromkeys(names, UNKNOWN), **self._found_before(row, names), **row.checked})
            for row in matching
        ]
        failing = [
            row
            for row in found
            if (row.is_reference and not names if origin is None else not fnmatchcase(row.origin, origin))
            or not all(row.checked[name].startswith("yes") for name in names)
        ]
        if failing:
            lines = [
                f"{len(failing)} of {len(matching)} layers that match {pattern!r} are not served by {wanted}:",
                *(line for row in together(failing) for line in row.described),
                *(f"A plugin failed, and may have had a kernel: {fault}" for fault in plugin_manager().faults),
                "Offer a kernel that fits, correct the reasons above, or require less. `kernels-core plugins` lists "
                "who offers kernels.",
            ]
            raise RequirementError("\n".join(lines), rows=failing)
        return self

    def _found_before(self, row: ReceiptRow, names: Sequence[Numeric]) -> dict[str, str]:
        """Return findings of earlier processes, which no decision reads while nothing is required."""
        resolution = next((one for one, other in self._grounds.decided if other is row), None)
        layer = resolution.request.layer if resolution is not None else None
        if resolution is None or layer is None or row.checked.keys() >= {*names}:
            return {}
        request, wanted = resolution.request, WantedNumerics(tuple(names), required=False)
        again = resolver.decide(layer, request.device, (request.mode,), scopes=(wanted, *request.scopes))
        if again.implementation is not resolution.implementation:
            return {}
        return {name: again.checked[name] for name in names if name in again.checked}

    def diff(self, other: Receipt) -> ReceiptDiff:
        """Return the differences of another receipt from this one.

        Example:
            >>> bool(Receipt(()).diff(Receipt(())))
            False
        """
        if not isinstance(other, Receipt):
            raise ArgumentTypeError(f"diff takes another receipt, not {other!r}.")
        mine, theirs = ({row.path: row for row in receipt.rows} for receipt in (self, other))
        both = [(row, theirs[path]) for path, row in mine.items() if path in theirs]  # in the order of this receipt
        return ReceiptDiff(
            changed=tuple((before, after) for before, after in both if served_in(before) != served_in(after)),
            added=tuple(row for path, row in theirs.items() if path not in mine),
            removed=tuple(row for path, row in mine.items() if path not in theirs),
        )

    def freeze(self, path: str | os.PathLike[str]) -> Path:
        """Write the decisions to a file that `KERNELS_DECISIONS` replays: the same kernels, of the same bytes.

        Decisions in the file for other models, hardware and modes are kept. May load kernels: those that serve the
        calls which the first ones pass on.

        Args:
            path: The file, such as `"kernels.decisions.json"`.

        Returns:
            The path.

        Raises:
            ArgumentError: If it cannot be written, or is another kind of file; nothing is written then.
            DecisionError: If a decision cannot be frozen: a kernel could not be reached, or a file that is replayed
                now does not hold.

        Example:
            >>> import tempfile
            >>> place = receipt(nn.Linear(2, 2)).freeze(f"{tempfile.mkdtemp()}/kernels.decisions.json")
            >>> place.name
            'kernels.decisions.json'
        """
        return self.decisions().save(path)

    def decisions(self) -> DecisionFile:
        """Return the decisions as `freeze` writes them.

        Raises:
            ArgumentError: If this receipt was copied from another process, which has the kernels.
            DecisionError: As `freeze`.

        Example:
            >>> str(receipt(nn.Linear(2, 2)).decisions())
            'no decision'
        """
        if self.rows and not self._grounds.decided:
            raise ArgumentError("This receipt was copied from another process: freeze it in the one that made it.")
        return self._grounds.freeze()

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON: a list of rows, each with the provenance of the code that serves it.

        Example:
            >>> Receipt(()).to_json()
            '[]'
        """

        def listed(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
            return [{"candidate": candidate, "reason": reason} for candidate, reason in pairs]

        rows = [
            {
                **vars(row),
                "refusals": listed(row.refusals),
                "misfits": listed(row.misfits),
                "provenance": provenance_of(row),
            }
            for row in self.rows
        ]
        return as_json(rows, indent=indent)

    def as_page(self) -> Page:
        """Return the page: a summary, then equal layers together, those on the reference first, with the reasons."""
        return receipt_page(self.rows, self.about, self.faults)

    def to_html(self) -> str:
        """Return the page as one file.

        Example:
            >>> Receipt(()).to_html()[:15]
            '<!doctype html>'
        """
        return self.as_page().to_html()

    def _repr_html_(self) -> str:
        return self.as_page()._repr_html_()

    def as_table(self) -> Table:
        """Return the rows with their reasons: green where a kernel serves, yellow where the reference does."""
        if not self.rows:
            return Table(
                COLUMNS, summary="no decorated layer; adopt(model) makes layers of an undecorated model dispatch"
            )
        shown = len(COLUMNS) - all(row.calls is None for row in self.rows)  # the last column is that of calls
        rows = [TableRow(row.cells[:shown], row.style, tuple(row.remarks)) for row in together(self.rows)]
        return Table(COLUMNS[:shown], rows)


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
    return receipt_of(model, device, mode, {})


def receipt_of(
    model: nn.Module,
    device: str | torch.device | Device | None,
    mode: Mode | None,
    planned: Mapping[nn.Module, type[nn.Module]],
) -> Receipt:
    """Return the receipt that a model will have once some of its modules have other classes, as `kernelize` plans."""
    given = as_torch_device(device) if device is not None else None
    inferred = given or device_of(model)
    chosen = check_call_mode(mode) if mode is not None else Mode.TRAINING if model.training else Mode.INFERENCE
    where = locate(model, inferred) if given is None and inferred is not None else {}
    known: dict[tuple[Layer, torch.device], Resolution] = {}

    def decide(layer: Layer, module: nn.Module) -> Resolution:
        key = (layer, given or where.get(id(module)) or required_device(model, "receipt"))
        if key not in known:  # a model has many modules of one layer
            known[key] = resolver.decide(*key, (chosen,))
        return known[key]

    asked = functools.cache(called_by), functools.cache(functions_of)  # a model has few classes
    paths = module_paths(model)
    found = [one for module, places in paths.items() for one in _rows(places, module, planned, decide, *asked)]
    calls = calls_of([counted for counted, _, _ in found])
    rows = tuple(
        # Calls in compiled code are not counted: that none was is not known.
        replace(row, calls=count) if count is not None and (count or "compile" not in row.mode) else row
        for row, count in zip(with_bypassed(row for _, row, _ in found), calls, strict=True)
    )
    inner = [type(module) for module, places in paths.items() if "" in places][-1]  # below its wrappers
    decided = tuple((resolution, row) for (_, _, resolution), row in zip(found, rows, strict=True))
    grounds = Grounds(source_label(inner), decided)
    return Receipt(rows, _about(model, rows), tuple(map(str, plugin_manager().faults)), grounds)


def _about(model: nn.Module, rows: Iterable[ReceiptRow]) -> dict[str, str]:
    """Return the class of a model, the date, the GPU, and the versions of the packages of model and kernels."""
    about = {"model": type(model).__name__, "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"}
    on_cuda = any(row.device.startswith("cuda") for row in rows)
    if on_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # a receipt starts no GPU
        about["GPU"] = torch.cuda.get_device_name()
    about |= {"kernels-core": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    for place in (type(model).__module__, *(row.implementation for row in rows)):
        package = place.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", None)
        if isinstance(version, str) and package not in ("kernels_core", "kernels_plugins", "__main__"):
            about.setdefault(package, version)
    return about


def _rows(
    places: Sequence[str],
    module: nn.Module,
    planned: Mapping[nn.Module, type[nn.Module]],
    decide: Callable[[Layer, nn.Module], Resolution],
    called: Callable[..., Sequence[Layer]],
    of_class: Callable[..., Sequence[Layer]],
) -> Iterator[tuple[nn.Module | Layer, ReceiptRow, Resolution]]:
    """Yield the row of a module, if it is decorated, and those of the functions that it calls.

    Each stands between its caller and the decision for the layer, which may not be that of this module.
    """
    frozen: FrozenChoice | None = getattr(planned.get(module, type(module)), "kernels_frozen", None)
    original = type(module) if frozen is None else frozen.original
    if frozen is not None and module not in planned and not frozen.serves(module):
        frozen = None  # suspended, or its kernel is in quarantine: calls decide by themselves
    layer, forward = dispatched_layer(original.forward), original.forward
    if layer is not None:
        resolution = frozen.resolution if frozen is not None else None
        decided = resolution or decide(layer, module)
        if resolution is None and layer.condition is not None and not layer.condition(module):
            resolution = Resolution(decided.request, note="its condition is not met")
        resolution = for_module(resolution or decided, module)
        if (foreign := foreign_forward(module)) is not None:
            note = f"{foreign} runs, which was put on the module as its forward, and may call this one"
            resolution = replace(resolution, note="; ".join(filter(None, (resolution.note, note))))
        forward = resolution.implementation or layer.reference
        past = tuple(getattr(resolution.kernel_layer, "reads", ()))
        yield module, ReceiptRow.of(resolution, *places, frozen=frozen is not None, bypasses=past), decided
    functions = [*dict.fromkeys((*of_class(type(module)), *held_by(module), *called(forward, original)))]
    for function, name in zip(functions, names_of(functions), strict=True):
        kept = frozen.functions.get(function) if frozen is not None else None
        chosen = decided = kept or decide(function, module)
        names = [f"{place}:{name}" for place in places]
        past = ()
        if not chosen.is_reference and (computes := getattr(original, "kernels_computes", {}).get(function)):
            past = tuple(computes(module, chosen.request.mode))
            if not past:
                note = "not called: not in this mode, or not while a part of the module is as it is now"
                chosen = Resolution(chosen.request, note=note)
        yield function, ReceiptRow.of(chosen, *names, frozen=kept is not None, bypasses=past), decided
