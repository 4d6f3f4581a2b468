"""Find the first layer whose bits differ between two models, or between two settings of one."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from kernels_core import ArgumentError, ArgumentTypeError, set_module

from .bits import Gap, gap
from .digests import GRADIENT_OUTPUT, INPUT, LEFT, OUTPUT, Digests, Event, Key, own_tensors
from .report import ConsistencyError, ConsistencyReport, Drift
from .side import Setting, Side


def consistency(
    a: nn.Module,
    b: nn.Module,
    inputs: object,
    *,
    setting_a: Setting | None = None,
    setting_b: Setting | None = None,
    batch_a: int | None = None,
    batch_b: int | None = None,
    gradients: bool = False,
    seed: int = 0,
) -> ConsistencyReport:
    """Run two models side by side, and find the first layer whose bits differ.

    Pass one model twice to compare two settings of it. Each runs once and leaves digests of what goes into and out of
    each layer, so memory does not grow with the number of layers; where bits differ, each runs once more, holds the
    tensors of that layer only, and shows whether it repeats itself. Buffers, gradients, training modes and random
    numbers are restored.

    Args:
        a: A model.
        b: Another, with layers of the same paths, or the same.
        inputs: A tensor, a tuple or list of arguments, a dict of named ones, or a function that makes any of these,
            anew for each run.
        setting_a: Makes the context manager that is entered around each run of `a`, such as `references`; or the path
            of a decision file, whose decisions are replayed.
        setting_b: That of `b`.
        batch_a: Rows of the inputs that `a` gets at once; None for all of them.
        batch_b: Those of `b`. Rows are compared with the same rows.
        gradients: Whether to run backward, too, from the same gradients of the outputs.
        seed: Random generators start from it in each layer, and it chooses the gradients of the outputs.

    Returns:
        The first difference, if there is any.

    Raises:
        ArgumentError: For a batch below 1, or gradients of different batches.
        ArgumentTypeError: For anything of the wrong type, such as an iterator as inputs.
        ConsistencyError: If nothing can be compared: a model raises or changes its parameters, the inputs of the two
            are different, or they have no path in common.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> other = torch.nn.Sequential(model[0], torch.nn.LayerNorm(4, eps=1e-6), model[2])
        >>> report = consistency(model, other, torch.randn(3, 4))
        >>> report.ok, report.drift.path, report.drift.causes
        (False, '1', ('eps is 1e-05 in a and 1e-06 in b',))
    """
    _check(a, b, setting_a, setting_b, batch_a, batch_b, gradients, seed)
    sides = Side("a", a, setting_a, batch_a), Side("b", b, setting_b, batch_b)
    by_row = batch_a != batch_b

    def run(side: Side, **more: Any) -> Digests:
        with warnings.catch_warnings():
            # Of inputs that need no gradient, and of outputs that hold tensors, such as those of transformers.
            warnings.filterwarnings("ignore", "Full backward hook is firing|For backward hooks to be called")
            return side.run(inputs, seed, by_row=by_row, gradients=gradients, parameters=a is not b, **more)

    whole = [run(side, only=[side.model]) for side in sides] if any(side.is_compiled for side in sides) else []
    records = [run(side) for side in sides]
    common = [key for key in records[0].events if key in records[1].events]
    if not any(path for _, path, _ in common) and any(path for record in records for _, path, _ in record.events):
        raise ConsistencyError(
            "a and b have no layer in common: layers are compared by path, and the paths of one are "
            f"{_some(records[0])}, those of the other {_some(records[1])}. Compare models of one structure."
        )
    found = [key for key in common if not _agree(records[0].events[key], records[1].events[key])]
    # A layer that writes to its input on one side only has an event that the other lacks: a cause of what comes after.
    left = [key for record in records for key in record.events if key[0] == LEFT and key not in common]
    first = min([*found[:1], *left[:1]], key=lambda key: _place(key, records)) if found else None
    notes: list[str] = []
    for side, record in zip(sides, records, strict=True):
        if side.decided is not None and side.decided.isdisjoint(map(record.layer_name, record.origins)):
            notes.append(f"setting_{side.name} is a decision file without a decision for a layer of the model")
    if left and not found:
        notes.append(f"written to in place on one side only, without effect: the input of {left[0][1]}")
    if opaque := sorted({*records[0].opaque, *records[1].opaque}):
        paths = ", ".join(path or "(the model)" for path in opaque[:5])
        notes.append(f"with values that have no plain bits, which are compared by type: {paths}")
    elsewhere = {key[1] for key in common if _elsewhere(*(record.events[key] for record in records))}
    if elsewhere:
        notes.append(
            "not compared, for the rows of the batch are not in the first dimension of a value: "
            f"{', '.join(path or '(the model)' for path in sorted(elsewhere)[:5])}"
        )
    returned = [record.events[OUTPUT, "", 1].whole.keys() for record in records if (OUTPUT, "", 1) in record.events]
    if len(returned) == 2 and (alone := sorted(returned[0] ^ returned[1])):
        notes.append(f"returned by one side only, which are not compared: {_names(alone[:5])}")
    if first is None and whole and not _agree(*(record.events[OUTPUT, "", 1] for record in whole)):
        first, records = (OUTPUT, "", 1), whole
        notes.append("layer by layer, compiled code computes the same bits; compiled as a whole, it does not")
    if first is not None and first[:2] == (INPUT, ""):
        raise ConsistencyError(
            "The inputs of a and b differ before any layer runs: make the same ones each time, without random numbers "
            "and in the same order."
        )
    drift: Drift | None = None
    unsteady: tuple[str, ...] = ()
    if first is not None:
        only = [[side.model] if records is whole else None for side in sides]
        again = [run(side, hold=first, only=those) for side, those in zip(sides, only, strict=True)]
        unsteady = tuple(
            side.name for side, *both in zip(sides, records, again, strict=True) if not _repeats(first, *both)
        )
        drift = _drift(first, records, again)
    only_a, only_b = (_missing(records[i], records[1 - i]) for i in (0, 1))
    differing = {path for _, path, _ in found} | ({first[1]} if first is not None else set())
    return ConsistencyReport(
        drift,
        len({path for _, path, _ in common} - elsewhere),
        len(differing),
        (OUTPUT, "", 1) not in found and "" not in elsewhere and records is not whole,
        tuple(dict.fromkeys((*records[0].random, *records[1].random))),
        unsteady,
        only_a,
        only_b,
        tuple(notes),
        (sides[0].runs, sides[1].runs),
    )


def _check(
    a: Any, b: Any, setting_a: Any, setting_b: Any, batch_a: Any, batch_b: Any, gradients: Any, seed: Any
) -> None:
    for name, model in (("a", a), ("b", b)):
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"consistency compares two nn.Modules; {name} is {model!r}.")
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ArgumentError(f"{name} has tensors on the meta device, which have no bits: move it to another.")
    for name, setting in (("setting_a", setting_a), ("setting_b", setting_b)):
        if not (setting is None or callable(setting) or isinstance(setting, str | os.PathLike)):
            raise ArgumentTypeError(
                f"{name} is a function that returns a context manager, or the path of a decision file, not {setting!r}."
            )
        if isinstance(setting, str | os.PathLike) and not os.path.isfile(setting):
            raise ArgumentError(f"{name} is {os.fspath(setting)!r}, which is no file: name a decision file.")
    for name, batch in (("batch_a", batch_a), ("batch_b", batch_b)):
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
            raise ArgumentTypeError(f"{name} is a number of rows, not {batch!r}.")
        if batch is not None and batch < 1:
            raise ArgumentError(f"{name} is {batch}: a part of a batch has 1 row or more.")
    if not isinstance(gradients, bool) or isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"gradients is True or False, and seed an integer, not {gradients!r} and {seed!r}.")
    if gradients and batch_a != batch_b:
        raise ArgumentError(
            "The gradient of a parameter is a sum over all rows, so it has other bits for batches of other sizes: "
            "compare gradients with batch_a equal to batch_b."
        )


def _agree(a: Event, b: Event) -> bool:
    """Whether all values that both events have are the same: as a whole, or row by row for batches of other sizes."""
    if a.key[0] == OUTPUT and _apart(a, b):
        return False
    for name in a.whole.keys() & b.whole.keys():
        ours, theirs = a.whole[name], b.whole[name]
        if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
            continue
        rows, others = (_rows(event.parts.get(name)) for event in (a, b))
        if rows is not None and rows == others and ours[0][0] == theirs[0][0]:
            continue
        if _is_elsewhere(ours, theirs):
            continue
        # One that is no batch is the same in each part, such as positions.
        if len(ours) != len(theirs) and all(_same(ours[0], each) for each in (*ours, *theirs)):
            continue
        return False
    return True


def _elsewhere(a: Event, b: Event) -> list[str]:
    """Return the names of values whose rows of the batch are not in the first dimension."""
    return [name for name in a.whole if name in b.whole and _is_elsewhere(a.whole[name], b.whole[name])]


def _is_elsewhere(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether parts of a batch have other shapes on both sides, for rows are in another dimension than the first."""
    both = [*ours, *theirs]
    if len(ours) == len(theirs) or not all(isinstance(each, tuple) for each in both) or len({e[0] for e in both}) > 1:
        return False
    shapes, others = ([each[1] for each in side] for side in (ours, theirs))
    if len({len(shape) for shape in (*shapes, *others)}) > 1:
        return False
    for place in range(1, len(shapes[0])):
        rest = {shape[:place] + shape[place + 1 :] for shape in (*shapes, *others)}
        sizes = [sum(shape[place] for shape in side) for side in (shapes, others)]
        if len(rest) == 1 and sizes[0] == sizes[1]:
            return True
    return False


def _apart(a: Event, b: Event) -> bool:
    """Whether two events have no value in common to compare, though one has some."""
    return a.whole.keys() != b.whole.keys() and a.whole.keys().isdisjoint(b.whole)


def _names(values: Iterable[str]) -> str:
    return ", ".join(name or "one value" for name in sorted(values)) or "nothing"


def _same(ours: Any, theirs: Any) -> bool:
    both_nan = isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours) and math.isnan(theirs)
    return both_nan or bool(type(ours) is type(theirs) and ours == theirs)


def _rows(parts: list[Any] | None) -> list[int] | None:
    if parts is None or any(part is None for part in parts):
        return None
    return [row for part in parts for row in part]


def _place(key: Key, records: list[Digests]) -> int:
    """Return the place of an event among those of a model that has it."""
    record = next(record for record in records if key in record.events)
    return list(record.events).index(key)


def _repeats(first: Key, record: Digests, again: Digests) -> bool:
    """Whether a second run has the same bits up to an event."""
    for key, event in record.events.items():
        if key in again.events and not _agree(event, again.events[key]):
            return False
        if key == first:
            break
    return True


def _missing(record: Digests, other: Digests) -> tuple[str, ...]:
    """Return the paths that only one record has, without those inside of others."""
    paths = {path for _, path, _ in other.events}
    missing = dict.fromkeys(path for kind, path, _ in record.events if kind == INPUT and path not in paths)
    return tuple(path for path in missing if not any(path.startswith(f"{around}.") for around in missing))


def _some(record: Digests) -> str:
    paths = list(dict.fromkeys(path for _, path, _ in record.events if path))
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "") or "none but the model itself"


def _drift(key: Key, records: list[Digests], again: list[Digests]) -> Drift:
    kind, path, call = key
    events = [record.events.get(key) for record in records]
    event = next(each for each in events if each is not None)
    value, blamed = kind, path
    if kind in (INPUT, GRADIENT_OUTPUT) and event.parent is not None:
        value, blamed = f"{kind} of {path!r}", event.parent
    own = GRADIENT_OUTPUT if "gradient" in kind else INPUT
    before = (own, path, call) if blamed == path else (own, blamed, 1)
    inputs = [record.events.get(before) for record in records]
    name, example = "", ""
    measured: Gap | None = None
    causes: list[str] = []
    for place, ours, theirs in _held(key, again):
        if ours.shape != theirs.shape:
            name = place
            causes.append(f"shape {tuple(ours.shape)} in a and {tuple(theirs.shape)} in b")
            break
        measured = gap(ours, theirs)
        if measured is not None:
            name = place
            if ours.dtype is not theirs.dtype:
                causes.append(f"{ours.dtype} in a and {theirs.dtype} in b")
            x, y = measured.values
            example = f"at {list(measured.index)}: {x:.9g} in a and {y:.9g} in b"
            break
    else:
        causes += _constants(*events)
        a, b = events
        if kind == OUTPUT and a is not None and b is not None and _apart(a, b):
            causes.append(f"it returns {_names(a.whole)} in a and {_names(b.whole)} in b")
    if None in events:
        causes.append(f"only {'ab'[events.index(None) == 0]} changes it")
    causes += _differences(*(record.module(blamed) for record in records))
    return Drift(
        path=blamed,
        layer=records[0].layer_name(blamed),
        call=call,
        value=value,
        name=name,
        a=records[0].implementation(blamed),
        b=records[1].implementation(blamed),
        inputs_agree=inputs[0] is not None and inputs[1] is not None and _agree(inputs[0], inputs[1]),
        elements=measured.elements if measured is not None else None,
        total=measured.total if measured is not None else None,
        ulps=measured.ulps if measured is not None else None,
        largest=measured.largest if measured is not None else None,
        example=example,
        causes=tuple(causes),
        unknown=_unknown(*inputs),
    )


def _unknown(a: Event | None, b: Event | None) -> tuple[str, ...]:
    """Return the names of values that two events hold, and that are not compared."""
    if a is None or b is None:
        return ()
    return tuple(sorted({*a.objects, *b.objects, *_elsewhere(a, b)}))


def _held(key: Key, again: list[Digests]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the tensors of an event on both sides, the parts of a batch joined."""
    held = [again[i].events[key].held if key in again[i].events else [] for i in (0, 1)]
    for name in held[0][0] if all(held) else ():
        if any(name not in part for side in held for part in side):
            continue
        ours, theirs = ([part[name] for part in side] for side in held)
        if len(ours) != len(theirs) and ours[0].shape == theirs[0].shape:
            yield name, ours[0], theirs[0]  # no batch
        else:
            joined = [torch.cat(each) if len(each) > 1 and each[0].dim() else each[0] for each in (ours, theirs)]
            yield name, joined[0], joined[1]


def _constants(a: Event | None, b: Event | None) -> Iterator[str]:
    for name in a.whole if a is not None and b is not None else {}:
        ours, theirs = a.whole[name], b.whole.get(name, [None])  # type: ignore[union-attr]
        if not isinstance(ours[0], tuple) and not all(map(_same, ours, theirs)):
            yield f"{name} is {ours[0]!r} in a and {theirs[0]!r} in b"


def _differences(a: nn.Module | None, b: nn.Module | None) -> Iterator[str]:
    """Yield how two modules differ: their own tensors, and attributes that are numbers, flags or texts."""
    if a is None or b is None or a is b:
        return
    theirs = dict(own_tensors(b))
    for name, tensor in own_tensors(a):
        other = theirs.get(name)
        if other is None or tensor is other:
            continue
        if tensor.shape != other.shape or tensor.dtype is not other.dtype:
            sort = f"{tensor.dtype} {tuple(tensor.shape)} in a and {other.dtype} {tuple(other.shape)}"
            yield f"{name} is {sort} in b"
        elif (found := gap(tensor, other)) is not None:
            yield f"{name} differs in {found.elements:,} of {found.total:,} numbers, at {list(found.index)} most"
    for name, value in vars(a).items():
        other_value = vars(b).get(name)
        plain = isinstance(value, bool | int | float | str) and not name.startswith("_")
        if plain and name in vars(b) and not _same(value, other_value):
            yield f"{name} is {value!r} in a and {other_value!r} in b"


set_module("kernels_plugins", globals())
