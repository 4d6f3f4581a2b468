"""The command `kernels-core choose`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from kernels_core import ArgumentError, KernelsError, find_layer
from kernels_core.cli import Factory, Json, made, print_found, printing_aside, run, with_inputs, writing

from ..adoption.adopted import adopt
from ..files import write_file
from ..oracle.isolated import run_child, serving
from .cell import CONTEXTS, Context
from .choice import Choice
from .choosing import Batch, check_options, measured, record_calls
from .machine import MeasuredOn
from .race import MODES, ModeName, RacedCall

Begin = Callable[[RacedCall, str, str], str]

PATIENCE = 300.0
"""Seconds that one candidate may take on one call, compiling included, before it counts as hanging."""


def choose_command(
    factory: Factory,
    inputs: Annotated[str, typer.Option(help="A function that returns a list of inputs, as package.module:name.")] = "",
    device: Annotated[str, typer.Option(help="Move model and inputs there first, such as cuda.")] = "",
    output: Annotated[Path, typer.Option(help="The file to write, or to add to.")] = Path("kernels.choice.json"),
    html: Annotated[Path | None, typer.Option(help="Write a page about the result, too.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="inference or training; by default both. Repeatable.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CONTEXTS)}; by default all. Repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For the timing of each candidate on each kind of call.")] = 0.2,
    patience: Annotated[float, typer.Option(help="Seconds after which a candidate hangs, and is left out.")] = PATIENCE,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run in this process, for a debugger: a crash ends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure which candidate is best for each layer of a model, and each shape; save that for use_choice.

    Each input is a tensor, a tuple of arguments, or a dict of named ones; without --inputs, the dummy_inputs of the
    model. An undecorated model is adopted first. A candidate that ends its process, or hangs, is left out.
    """
    if output.exists():
        Choice.load(output)  # raises before anything is measured
    check_options(context or CONTEXTS, seconds, mode or [*MODES])
    check_patience(patience)
    arguments: dict[str, Any] = {
        "factory": factory,
        "inputs": inputs,
        "device": device,
        "modes": mode or [*MODES],
        "contexts": context or list(CONTEXTS),
        "seconds": seconds,
    }
    if in_process:
        choice = choose(**arguments)
    else:
        rows = in_children("kernels_plugins.choice.command", "choose", arguments, patience)
        choice = functools.reduce(Choice.merged, map(Choice.read, rows), Choice())
    with writing(output):
        choice.save(output)
    if html is not None:
        with writing(html):
            write_file(html, choice.to_html())
    print_found(choice, as_json)
    if not as_json:
        print(f"\nIn {output}. Use it: KERNELS_CHOICE={output}, or use_choice({str(output)!r}).", file=sys.stderr)


def check_patience(patience: float) -> None:
    """Refuse a patience that is no time."""
    if not patience > 0:
        raise ArgumentError(f"--patience is {patience:g}: give seconds above 0.")


def choose(
    factory: str,
    inputs: str,
    device: str,
    modes: Sequence[ModeName],
    contexts: Sequence[Context],
    seconds: float,
    begin: Begin = lambda subject, candidate, action: "",
    found: Callable[[Any], object] = lambda row: None,
    known: Sequence[Any] = (),
) -> Choice:
    """Measure a model that is named by its factory; `found` gets what each call adds, and `known` has what it got."""
    model, batches = given(factory, inputs, device)
    places = {cell.of_subject for row in known for one in Choice.read(row).machines for cell in one.cells}
    with printing_aside():
        if isinstance(model, nn.Module):
            adopt(model)
        recorded = record_calls(model, batches, modes)
        if not recorded:
            raise ArgumentError(f"{factory} calls no layer that is decorated or adopted with these inputs.")

        def found_cells(cells: MeasuredOn) -> None:
            found(json.loads(Choice((cells,)).to_json()))

        subjects = [subject for subject in recorded if subject.place not in places]
        return measured(subjects, contexts, seconds, progress=False, begin=begin, found=found_cells)


def given(factory: str, inputs: str, device: str) -> tuple[Any, list[Batch]]:
    """Return a model or a decorated function that is named by its factory, and its inputs, on a device."""
    model = made(factory)
    layer = find_layer(model)
    if not isinstance(model, nn.Module) and not (layer is not None and layer.is_function):
        raise ArgumentError(
            f"{factory} is a {type(model).__name__}, neither a module nor a decorated function: name a model, or its "
            "factory."
        )
    model, batches = with_inputs(model, inputs, device, "a list of them")
    each = batches if isinstance(batches, list) else [batches]
    return model, [
        ((), one) if isinstance(one, Mapping) else (one if isinstance(one, tuple) else (one,), {}) for one in each
    ]


def in_children(module: str, name: str, arguments: Mapping[str, Any], patience: float) -> list[Any]:
    """Measure in child processes, and return their rows; where a candidate ends one or hangs, the next leaves it out.

    Args:
        module: It calls `serve` with its first argument.
        name: The command.
        arguments: Those of the function that `serve` calls, as JSON holds them.
        patience: Seconds that one candidate may take on one call.
    """
    out: list[tuple[str, str, str]] = []
    rows: list[Any] = []
    shown: set[str] = set()
    while True:
        task = {"arguments": dict(arguments), "out": out, "known": rows}
        child = run_child(module, task, name, shown, patience=patience)
        rows += child.rows
        if not child.how:
            return rows
        if child.begun is None:
            if child.refused:  # it has written why
                raise typer.Exit(2)
            raise KernelsError(f"The process that measures ended {child.how}: see its output above.")
        out.append((*child.begun, f"it ends the process {child.how}"))


def serve(task: Mapping[str, Any], measure: Callable[..., object]) -> None:
    """Measure in this process, and write messages to its parent."""
    out: dict[tuple[str, str], str] = {(subject, candidate): reason for subject, candidate, reason in task["out"]}
    with serving() as write:

        def begin(subject: RacedCall, candidate: str, action: str) -> str:
            if (subject.text, candidate) not in out:
                write({"begin": [subject.text, candidate], "text": f"{subject.text}: {candidate} {action}"})
            return out.get((subject.text, candidate), "")

        measure(**task["arguments"], begin=begin, found=lambda row: write({"row": row}), known=task["known"])


if __name__ == "__main__":  # in a child of `in_children`
    run(lambda: serve(json.loads(sys.argv[1]), choose))
