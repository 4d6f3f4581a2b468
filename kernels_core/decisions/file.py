"""`DecisionFile`: the kernels that serve the layers of models, by hardware and mode, as a file to replay."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import ArgumentError, DecisionError, require_type
from ..mode import Mode
from ..resolution import LayerRequest
from ..table import Table, TableRow, Tabular, as_json, folded
from .content import in_program
from .files import alone_in, of_format, read_json, write_file
from .frozen import FrozenLayer, FrozenModel, hardware, read_model

FORMAT = 1

_UNSEEN = (
    " If `receipt(model)` does not list the function, because its caller finds it in another way than by a name in its "
    "code, put @use_kernelized_func(function) on the class of the module that calls it first."
)


@dataclass(frozen=True)
class DecisionFile(Tabular):
    """Decisions that can be replayed: `KERNELS_DECISIONS` names such a file.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        models: The decisions, by model, class of hardware and mode.

    Example:
        >>> found = FrozenLayer("Norm", "shop.Norm", ("norm",), (FrozenKernel("acme.Norm", "acme.Norm"),))
        >>> print(DecisionFile((FrozenModel("shop.Net", "cpu", None, "inference", (found,)),)))
        path  layer  device  mode
        norm  Norm   cpu     inference
            acme.Norm
    """

    models: tuple[FrozenModel, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two decisions for one kind of call."""
        known: dict[object, tuple[FrozenModel, FrozenLayer]] = {}
        for model in self.models:
            for layer in model.decided:
                other, first = known.setdefault((model.where, model.mode, layer.key), (model, layer))
                if str(first) != str(layer):
                    raise ArgumentError(
                        f"Layer {layer.layer!r} ({layer.defined}) is decided twice for {model.where}, {model.mode}: "
                        f"{first} in {other.model}, and {layer} in {model.model}. A call is decided by its layer, not "
                        "by its model: give each model a file, or the layers different names."
                    )

    def merged(self, newer: DecisionFile) -> DecisionFile:
        """Return both; of decisions for one model, class of hardware and mode, the newer ones.

        Args:
            newer: The other file.

        Raises:
            ArgumentError: If they decide a layer in two ways for the same calls.
        """
        require_type(newer, DecisionFile, "newer")
        models = {(each.model, each.where, each.mode): each for each in (*self.models, *newer.models)}
        return DecisionFile(tuple(models.values()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, or add to one: decisions for other models, hardware and modes are kept. Whole or not at all.

        Args:
            path: The file.

        Returns:
            The path.

        Raises:
            ArgumentError: If it cannot be written, or is another kind of file, which is not touched.
        """
        require_type(path, (str, os.PathLike), "The path of a decision file")
        where = Path(path)
        try:
            with alone_in(where.parent):  # two ranks that freeze into one file would drop what the other one adds
                kept = DecisionFile.from_file(where).merged(self) if where.exists() else self
                write_file(where, kept.to_json() + "\n")
        except (OSError, ValueError) as error:
            if isinstance(error, ArgumentError):
                raise
            problem = getattr(error, "strerror", None) or error
            raise ArgumentError(f"Cannot write the decision file {os.fspath(path)!r}: {problem}.") from error
        return where

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> DecisionFile:
        """Read a file.

        Args:
            path: The file.

        Raises:
            ArgumentError: If it cannot be read, or is no such file; names the problem.
        """
        remedy = "`kernels-core freeze`, or receipt(model).freeze(path), makes one"
        return read_json(path, cls.from_json, "decision file", remedy)

    @classmethod
    def from_json(cls, value: Any) -> DecisionFile:
        """Make one of its parsed JSON.

        Args:
            value: The JSON that `to_json` wrote, parsed.

        Raises:
            ArgumentError: If it is of another format, or malformed.
        """
        return of_format(value, "decisions", FORMAT, lambda found: cls(tuple(map(read_model, found["models"]))))

    def to_json(self) -> str:
        """Return the content of a file: equal decisions give equal bytes.

        Example:
            >>> DecisionFile().to_json()
            '{"decisions": 1, "models": []}'
        """
        return as_json({"decisions": FORMAT, "models": self.models}, indent=1 if self.models else None)

    def find(self, request: LayerRequest, mode: Mode, *, file: str = "the decision file") -> FrozenLayer:
        """Return the decision for a request.

        Args:
            request: The request.
            mode: The mode of its call: it may be about two of them.
            file: The name of this file, for messages.

        Raises:
            DecisionError: If there is none: the file is for other hardware, other modes or another model.
        """
        require_type(request, LayerRequest, "request")
        require_type(mode, Mode, "mode")
        kind, asked = (hardware(request.device)[0], request.capability), request.in_mode(mode)
        layer = in_program(request.layer.qualname) if request.layer is not None else ""
        here = FrozenModel("", *kind, asked.mode_text, ())
        same = [model for model in self.models if (model.device, model.capability) == kind]
        if not same:
            known, wanted = {model.where for model in self.models}, here.where
        elif not (same := [model for model in same if model.mode == here.mode]):
            known, wanted = {model.mode for model in self.models if model.where == here.where}, f"mode {here.mode!r}"
        else:
            for found in (found for model in same for found in model.decided):
                # By class or function, too: two classes may be decorated with one name.
                if found.layer == request.layer_name and (not layer or found.defined == layer):
                    return found
            known, wanted = {model.model for model in same}, f"{layer or 'this layer'}"
        traced = " --compile" if Mode.TORCH_COMPILE in mode else ""
        unseen = _UNSEEN if request.layer is not None and request.layer.is_function else ""
        raise DecisionError(
            f"{file} has no decision for {asked}{f' ({layer})' if layer else ''}: it has none for {wanted}, and some "
            f"for {', '.join(sorted(known)) or 'nothing'}. Freeze this model here, too, into the same file: "
            f"kernels-core freeze MODULE:FACTORY --device {request.device.type}{traced} --output FILE.{unseen}",
            layer=request.layer_name,
            found=wanted,
            request=request,
        )

    def places(self) -> Iterator[tuple[tuple[str, str, str], FrozenLayer, str]]:
        """Yield each path with its class of hardware and mode, its layer, and the text of its kernels there."""
        for model in self.models:
            for layer in model.decided:
                for path in layer.paths:
                    yield (path, model.where, model.mode), layer, str(layer)
                for path, reason in layer.others.items():
                    yield (path, model.where, model.mode), layer, reason

    def diff(self, other: DecisionFile) -> DecisionDiff:
        """Return the differences of another file from this one: by path, class of hardware and mode.

        Args:
            other: The other file.

        Raises:
            ArgumentTypeError: If that is none.

        Example:
            >>> print(DecisionFile().diff(DecisionFile()))
            no difference
        """
        require_type(other, DecisionFile, "The other decision file")
        mine, theirs = ({key: (layer, text) for key, layer, text in each.places()} for each in (self, other))
        rows = []
        for key in dict.fromkeys((*mine, *theirs)):
            (before, was), (after, now) = mine.get(key, (None, "")), theirs.get(key, (None, ""))
            known = cast(FrozenLayer, before or after)
            if was == now and _records(before) != _records(after):
                was, now = f"{was} as measured before", f"{now} as measured after"
            if was != now or (before and before.key) != (after and after.key):
                rows.append(DecisionChange(*key, known.layer, was or "not there", now or "not there"))
        return DecisionDiff(tuple(rows))

    def as_table(self) -> Table:
        """Return a row for each layer, with its kernels; layers that are served alike are one row."""
        return _table(
            (key, layer.layer, (text, *([layer.note] if layer.note and text == "reference" else [])))
            for key, layer, text in self.places()
        )


def _records(layer: FrozenLayer | None) -> list[Any]:
    return [kernel.record for kernel in layer.kernels] if layer is not None else []


@dataclass(frozen=True)
class DecisionChange:
    """A difference between two decision files.

    Attributes:
        path: The path in the model.
        where: The class of hardware.
        mode: The mode.
        layer: The layer name.
        before: The kernels in the first file.
        after: Those in the second one.
    """

    path: str
    where: str
    mode: str
    layer: str
    before: str
    after: str


@dataclass(frozen=True)
class DecisionDiff(Tabular):
    """The differences between two decision files.

    Attributes:
        changes: The differences, by path.
    """

    changes: tuple[DecisionChange, ...]

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.changes)

    def as_table(self) -> Table:
        """Return a row for each difference, with both decisions below it."""
        if not self.changes:
            return Table((), summary="no difference")
        return _table(
            ((one.path, one.where, one.mode), one.layer, (f"- {one.before}", f"+ {one.after}")) for one in self.changes
        )

    def to_json(self) -> str:
        """Return the differences as JSON."""
        return as_json(self.changes)


def _table(rows: Iterable[tuple[tuple[str, str, str], str, tuple[str, ...]]]) -> Table:
    """Return a table with the origins below the rows: they are as long as a line."""
    found = folded((path, (layer, *at, notes), (layer, at, notes)) for (path, *at), layer, notes in rows)
    cells = [TableRow((path, layer, *at), "", notes) for path, (layer, at, notes) in found]
    return Table(("path", "layer", "device", "mode"), cells, summary="" if cells else "no decision")
