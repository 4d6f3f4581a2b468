"""The report of a comparison side by side, and the error where it has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels_core import KernelsError, Page, Table, TableRow, Tabular, as_json, set_module


class ConsistencyError(KernelsError):
    """Two models could not be compared; they are as before.

    Attributes:
        side: `"a"` or `"b"`, the model that is concerned; empty for both.
        path: The layer that ran, where one raised.
    """

    def __init__(self, message: str, *, side: str = "", path: str | None = None) -> None:
        super().__init__(message)
        self.side, self.path = side, path


@dataclass(frozen=True)
class Drift:
    """The first values whose bits differ.

    Attributes:
        path: The layer that computed them, as in `module_paths`; for a decorated function, that of the calling module,
            a colon, and its name.
        layer: The name of the layer in mappings, or its class.
        call: The number of its call in a run, from 1.
        value: Which values differ: `"output"`, `"input of 'path'"` for those that its own code computes for a layer in
            it, `"input after the call"` for an input that it changes in place, `"gradient of the input"`, ...
        name: The name of the value, where there are several.
        a: What computes the layer in `a`: the origin of a kernel, or a class.
        b: That in `b`.
        inputs_agree: Whether the inputs of the layer have the same bits on both sides; for a gradient, the gradients
            that arrive at its output.
        elements: How many numbers differ; None where dtypes or shapes do.
        total: How many there are.
        ulps: The largest difference in units in the last place; infinite where one side is NaN.
        largest: The largest absolute difference.
        example: The place where they differ most, with both numbers.
        causes: Differences of the layers themselves: dtypes, shapes, parameters, attributes.
        unknown: The inputs that were not compared: objects, such as caches, and those whose batch is not the first
            dimension, where batches differ.
    """

    path: str
    layer: str
    call: int
    value: str
    name: str
    a: str
    b: str
    inputs_agree: bool
    elements: int | None
    total: int | None
    ulps: float | None
    largest: float | None
    example: str
    causes: tuple[str, ...]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConsistencyReport(Tabular):
    """Whether two models compute the same bits, and the first layer where they do not.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        drift: The first difference; None if all bits are the same.
        layers: How many layers were compared, functions and each path once.
        differing: How many of them have a value that differs.
        outputs_agree: Whether the outputs of the models have the same bits.
        random: The layers that draw random numbers; both sides had the same seed in each.
        unsteady: The sides (`"a"`, `"b"`) that do not repeat their own bits up to the first difference.
        only_a: The layers that only `a` has, which were not compared.
        only_b: Those that only `b` has.
        notes: Further remarks.
        runs: How often each model ran, as often as it has parts of the batch.
    """

    drift: Drift | None
    layers: int
    differing: int
    outputs_agree: bool
    random: tuple[str, ...]
    unsteady: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]
    runs: tuple[int, int]

    @property
    def ok(self) -> bool:
        """Whether all bits that were compared are the same."""
        return self.drift is None

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return everything as JSON; numbers that are not finite are text.

        Example:
            >>> ConsistencyReport(None, 3, 0, True, (), (), (), (), (), (1, 1)).to_json(indent=None)[:28]
            '{"drift": null, "layers": 3,'
        """
        drift = vars(self.drift) if self.drift is not None else None
        return as_json({**vars(self), "drift": drift, "ok": self.ok}, indent=indent)

    def as_table(self) -> Table:
        """Return the first difference, between the finding and the remarks."""
        found = self.drift
        rows = [TableRow(_cells(found), notes=_notes(found))] if found is not None else []
        columns = ("layer", "value", "differ", "ulps", "largest", "a", "b")
        return Table(columns, rows, self._title(), "\n".join(self._remarks()), "green" if self.ok else "red")

    def page(self) -> Page:
        """Return a page for a browser."""
        style = "green" if self.ok else "red"
        card = TableRow((f"{self.layers - self.differing} of {self.layers}", "layers have the same bits"), style)
        return Page("Consistency", [self.as_table()], self._title(), [card])

    def _title(self) -> str:
        if self.drift is None:
            return f"all bits are the same in {self.layers} layers"
        where = f"{self.drift.path or '(the model)'} ({self.drift.layer})"
        rest = ", but the outputs of the models are the same" if self.outputs_agree else ""
        return f"the first layer whose bits differ is {where}; {self.differing} of {self.layers} differ{rest}"

    def _remarks(self) -> Iterator[str]:
        for side in self.unsteady:
            yield (
                f"{side} is not deterministic: a second run of the same inputs gave other bits here. Call "
                "torch.use_deterministic_algorithms(True), and look for state in layers and for generators of their own"
            )
        if self.random:
            yield f"random numbers, with the same seed on both sides: {_listed(self.random)}"
        for side, paths in (("a", self.only_a), ("b", self.only_b)):
            if paths:
                yield f"only in {side}, not compared: {_listed(paths)}"
        yield from self.notes


def _cells(drift: Drift) -> tuple[str, ...]:
    path = (drift.path or "(the model)") + (f", call {drift.call}" if drift.call > 1 else "")
    value = f"{drift.value} {drift.name}".strip()
    count = "" if drift.elements is None else f"{drift.elements:,} of {drift.total:,}"
    ulps = "" if drift.ulps is None else f"{drift.ulps:,}"
    largest = "" if drift.largest is None else f"{drift.largest:.3g}"
    return path, value, count, ulps, largest, drift.a, drift.b


def _notes(drift: Drift) -> list[str]:
    what = "the gradients of its output" if "gradient" in drift.value else "its inputs"
    agree = f"{what} have the same bits" if drift.inputs_agree else f"{what} differ, too"
    if drift.inputs_agree and drift.unknown:
        agree += f", as far as they are compared: not in {', '.join(drift.unknown)}"
    return [note for note in (agree, drift.example, *drift.causes) if note]


def _listed(paths: tuple[str, ...]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(path or "(the model)" for path in paths[:5]) + more


set_module("kernels_plugins", globals())
