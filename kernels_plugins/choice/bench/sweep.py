"""`bench`: all candidates for the layers of a model, timed at several sizes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    error_text,
    find_layer,
    require_type,
    set_module,
    source_label,
)
from kernels_core.replay import Call, leaves

from ...adoption.adopted import adopt
from ...oracle.inputs import Recorded, resized, with_gradients
from ...oracle.subject import stop_if_broken
from ..cell import ALIAS, REFERENCE, Context, key_of
from ..choosing import Batch, check_options, record_calls
from ..machine import libraries, machine_of
from ..race import MODES, ModeName, RacedCall, race
from .report import BenchReport, BenchRow

_COPY = "copy"
ROWS = (1, 16, 256, 4096)
MEASURED: tuple[Context, ...] = ("eager", "captured")
"""Contexts that are measured by default: to compile every size takes minutes."""


def bench(
    model_or_layer: nn.Module | Callable[..., Any],
    *inputs: Any,
    rows: Sequence[int] | None = ROWS,
    layers: Sequence[str] | None = None,
    modes: Sequence[ModeName] = tuple(MODES),
    contexts: Sequence[Context] = MEASURED,
    seconds: float = 0.2,
    **named_inputs: Any,
) -> BenchReport:
    """Time every candidate for the layers of a model, at several sizes, against the reference and a copy.

    The model runs once in each mode on its references, adopted for that long if it is undecorated; one call of each
    layer name, dtype and width is kept. It is made again with each number of rows. As for a
    [choice](choice.md#who-races), the candidates that compute what the reference computes are timed.

    Args:
        model_or_layer: A model; or a decorated layer or function.
        *inputs: Its positional arguments.
        rows: The numbers of rows of the first tensor of a call; None for those of the recorded calls.
        layers: The layer names; None for all.
        modes: `"inference"`, and `"training"`, with the backward.
        contexts: `"eager"`, `"captured"` (in CUDA graphs), `"compiled"`.
        seconds: For the timing of each candidate at each size, roughly.
        **named_inputs: Its keyword arguments.

    Returns:
        A report with a row for each candidate, size, mode and context.

    Raises:
        ArgumentError: If the model cannot be run with the inputs, or calls no such layer.
        ArgumentTypeError: If it is neither a module nor a decorated function.

    Example:
        >>> report = bench(torch.nn.RMSNorm(8), torch.randn(2, 8), rows=[1, 4], modes=["inference"], seconds=0.01)
        >>> sorted({(row.layer, row.rows) for row in report.rows}), report.ok
        ([('RMSNorm', 1), ('RMSNorm', 4)], True)
    """
    check_options(contexts, seconds, modes)
    check_sizes(rows, layers)
    layer = find_layer(model_or_layer)
    if not isinstance(model_or_layer, nn.Module) and not (layer is not None and layer.is_function):
        raise ArgumentTypeError(
            f"bench takes a module or a decorated function, not {source_label(model_or_layer)}: make an instance of a "
            "class, and decorate a function with @use_kernel_forward_from_hub(name)."
        )
    with Console(stderr=True).status("") as status:  # draws nothing where standard error is no terminal

        def begin(subject: RacedCall, candidate: str, action: str) -> str:
            status.update(f"{subject.text}: {candidate} {action}")
            return ""

        batch = (inputs, named_inputs)
        found = swept(model_or_layer, [batch], rows, layers, modes, contexts, seconds, begin)
        return BenchReport(tuple(row for size in found for row in size), described(model_or_layer, [batch]))


def check_sizes(rows: Sequence[int] | None, layers: Sequence[str] | None) -> None:
    """Refuse numbers of rows that are none, and names that are no text."""
    require_type(rows, (Sequence, NoneType), "rows")
    require_type(layers, (Sequence, NoneType), "layers")
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers or ()):
        raise ArgumentTypeError(f"layers is {layers!r}: give a list of layer names, or None for all.")
    if rows is not None and (not rows or not all(type(size) is int and 0 < size < 1 << 40 for size in rows)):
        raise ArgumentError(f"rows is {rows!r}: give numbers of rows above 0, such as 1 and 4096.")


def described(model: Any, batches: Sequence[Batch]) -> dict[str, str]:
    """Return the machine on which a model is measured, and the versions."""
    state = [] if not isinstance(model, nn.Module) else [*model.parameters(), *model.buffers()]
    tensors = [*state, *(leaf for _, leaf in leaves(list(batches)) if isinstance(leaf, torch.Tensor))]
    return {**machine_of(tensors[0].device if tensors else torch.device("cpu")), **libraries()}


def swept(
    model: Any,
    batches: Sequence[Batch],
    rows: Sequence[int] | None,
    layers: Sequence[str] | None,
    modes: Sequence[ModeName],
    contexts: Sequence[Context],
    seconds: float,
    begin: Callable[[RacedCall, str, str], str],
    known: Sequence[BenchRow] = (),
) -> Iterator[list[BenchRow]]:
    """Yield the rows of each call and size, but those that are `known`; `begin` is called as in `race`."""
    with adopt(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        subjects = record_calls(model, batches, modes)
        names = sorted({subject.recorded.layer.name for subject in subjects})
        missing = sorted({*(layers or ())}.difference(names))
        if missing or not names:
            called = f"calls {', '.join(names)}" if names else "calls no layer that is decorated or adopted"
            raise ArgumentError(f"With these inputs, the model {called}{f', not {missing[0]}' if missing else ''}.")
        done = {row.size for row in known}
        for subject in subjects:
            for size in rows or (None,):
                one = subject if size is None else sized(subject, size)
                blank = _blank(one)
                if blank.size not in done and blank.layer in (layers or names):
                    done.add(blank.size)
                    yield measure(one, blank, contexts, seconds, begin)


def sized(subject: RacedCall, rows: int) -> RacedCall:
    """Return a call with another number of rows, or with the nearest one below that its other sizes allow.

    The size before the last one changes, in all inputs that share it. A batch of sequences becomes one sequence. Other
    leading sizes, such as the number of heads, stay: rows are a multiple of these.
    """
    call = subject.recorded.call
    if _first(call).dim() < 2 or 0 in _first(call).shape[:-1]:
        return subject
    if _first(call).dim() == 3:
        call = resized(call, _first(call), 0, 1)
    main = _first(call)
    call = resized(call, main, main.dim() - 2, max(1, rows // math.prod(main.shape[:-2])))
    recorded = Recorded(subject.recorded.path, subject.recorded.layer, call)
    return replace(subject, recorded=recorded, key=key_of(_first(call)))


def _first(call: Call) -> torch.Tensor:
    return next(tensor for tensor in (*call.args, *call.kwargs.values()) if isinstance(tensor, torch.Tensor))


def _blank(subject: RacedCall) -> BenchRow:
    dtype, width, _ = subject.key
    rows = _first(subject.recorded.call).numel() // max(width, 1)
    name = subject.recorded.layer.name
    return BenchRow(name, subject.mode, "", str(dtype).removeprefix("torch."), width, rows, REFERENCE)


def measure(
    subject: RacedCall,
    blank: BenchRow,
    contexts: Sequence[Context],
    seconds: float,
    begin: Callable[[RacedCall, str, str], str],
) -> list[BenchRow]:
    """Verify and time all candidates for a call, and a copy that reads and writes as many bytes."""
    blanks = [replace(blank, context=one) for one in contexts if one != "captured" or subject.device.type == "cuda"]
    try:
        size = bytes_of(subject)
    except Exception as error:
        stop_if_broken(error)
        return [replace(one, reason=f"not of this size: {error_text(error)}"[:500]) for one in blanks]
    source = torch.ones(max(1, size // 8), device=subject.device)  # written: untouched pages are all one page of zeros
    target = torch.empty_like(source)
    beside = {_COPY: lambda: target.copy_(source)}  # in turn with the candidates: a slow moment slows all
    found = []
    for cell in race(subject, contexts, budget=seconds, begin=functools.partial(begin, subject), beside=beside):
        one = replace(blank, context=cell.context, bytes=size, copy=cell.times.get(_COPY))
        found += [replace(one, candidate=name, seconds=cell.times[name], ratio=cell.ratio(name)) for name in cell.order]
        found += [
            replace(one, candidate=name, reason=why) for name, why in cell.lost.items() if not why.endswith(ALIAS)
        ]
    timed = {row.context for row in found}
    why = {"compiled": "no other candidate can be compiled in a program, or it fails there"}
    missing = [one for one in blanks if one.context not in timed]
    found += [replace(one, reason=why.get(one.context, "it fails when it is timed")) for one in missing]
    return [row for row in found if row.candidate != _COPY]


def bytes_of(subject: RacedCall) -> int:
    """Return the bytes that a call has to read and to write, each once.

    Inputs, parameters and buffers are read, outputs are written; in training, gradients of outputs are read, and those
    of inputs and parameters are written.
    """
    call, reference = subject.recorded.call, subject.recorded.layer.reference
    with subject.autocasting():
        outputs = call.run(reference, gradients=False).outputs
    moved = [*{id(tensor): tensor for tensor in call.tensors.values()}.values(), *(leaf for _, leaf in leaves(outputs))]
    if subject.mode == "training":
        moved += [leaf for _, leaf in leaves(outputs) if torch.is_tensor(leaf) and leaf.is_floating_point()]
        moved += [tensor for tensor in with_gradients(call).tensors.values() if tensor.requires_grad]
    # Expanded tensors are smaller than their shape; and views may be of more than they show.
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in moved
        if isinstance(tensor, torch.Tensor)
    )


set_module("kernels_plugins", globals())
