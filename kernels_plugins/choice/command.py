"""The command `kernels-core choose`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from kernels_core import ArgumentError, KernelsError, references
from kernels_core.cli import Json, made, print_found, printing_aside, run, using_device, writing
from kernels_core.replay import mapped

from ..adoption.adopted import adopt
from ..files import write_file
from ..oracle.isolated import run_child, serving
from .cell import CONTEXTS, Context
from .choice import Choice
from .choosing import measured, recording
from .machine import MeasuredOn
from .race import RacedCall

PATIENCE = 300.0
"""Seconds that one candidate may take on one call, compiling included, before it counts as hanging."""


def choose_command(
    factory: Annotated[str, typer.Argument(help="A module, or a function that makes one, as package.module:name.")],
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
    unknown = [*({*(mode or ())} - {"inference", "training"}), *({*(context or ())} - {*CONTEXTS})]
    if unknown or not 0 < seconds < 1e6 or not patience > 0:
        problem = f"{unknown[0]!r} is no mode and no context" if unknown else "seconds and patience are above 0"
        raise ArgumentError(f"{problem}: see kernels-core choose --help.")
    arguments: dict[str, Any] = {
        "factory": factory,
        "inputs": inputs,
        "device": device,
        "modes": mode or ["inference", "training"],
        "contexts": context or list(CONTEXTS),
        "seconds": seconds,
    }
    choice = choose(**arguments) if in_process else _in_children(arguments, patience)
    if isinstance(choice, int):
        raise typer.Exit(choice)
    with writing(output):
        choice.save(output)
    if html is not None:
        with writing(html):
            write_file(html, choice.to_html())
    print_found(choice, as_json)
    if not as_json:
        print(f"\nIn {output}. Use it: KERNELS_CHOICE={output}, or use_choice({str(output)!r}).", file=sys.stderr)


def choose(
    factory: str,
    inputs: str,
    device: str,
    modes: Sequence[str],
    contexts: Sequence[Context],
    seconds: float,
    begin: Callable[[RacedCall, str, str], str] = lambda subject, candidate, action: "",
    found: Callable[[MeasuredOn], object] = lambda cells: None,
    known: Callable[[RacedCall], bool] = lambda subject: False,
) -> Choice:
    """Measure a model that is named by its factory; calls that are `known` are left out."""
    model = made(factory)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{factory} is a {type(model).__name__}, not a module: name a model, or its factory.")
    batches = _batches(model, inputs)
    with using_device(device) if device else nullcontext() as where:
        if where is not None:
            model = model.to(where)
            batches = mapped(batches, lambda _, leaf: leaf.to(where) if torch.is_tensor(leaf) else leaf)
    with printing_aside():
        adopt(model)
        with recording() as recorder, references(model):  # a kernel that ends the process must not serve now
            for training in sorted(mode == "training" for mode in modes):
                for batch in batches:
                    _call(model, batch, training=training)
        if not recorder.subjects:
            raise ArgumentError(f"{factory} calls no layer that is decorated or adopted with these inputs.")
        subjects = [subject for subject in recorder.subjects.values() if not known(subject)]
        return measured(subjects, contexts, seconds, progress=False, begin=begin, found=found)


def _batches(model: nn.Module, place: str) -> list[Any]:
    if place:
        given = made(place, "inputs")
        return list(given) if isinstance(given, list) else [given]
    dummy = getattr(model, "dummy_inputs", None)
    if dummy is None:
        raise ArgumentError(
            "The inputs of the model are not known, for it has no dummy_inputs: name a function that returns a list of "
            "them, with --inputs package.module:function."
        )
    return [dummy]


def _call(model: nn.Module, batch: Any, *, training: bool) -> None:
    was = model.training
    model.train(training)
    try:
        with torch.set_grad_enabled(training):
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    except Exception as error:
        raise ArgumentError(f"The model cannot be run with its inputs: {type(error).__name__}: {error}") from error
    finally:
        model.train(was)


def _in_children(arguments: Mapping[str, Any], patience: float) -> Choice | int:
    """Measure in child processes; where a candidate ends one or hangs, the next goes on without it."""
    out: list[tuple[str, str, str]] = []
    shown: set[str] = set()
    choice = Choice()
    while True:
        task = {"arguments": dict(arguments), "out": out, "known": json.loads(choice.to_json())}
        child = run_child("kernels_plugins.choice.command", task, "choose", shown, patience=patience)
        for row in child.rows:
            choice = choice.merged(Choice.read(row))
        if not child.how:
            return choice
        if child.begun is None:
            if child.refused:
                return 2
            raise KernelsError(f"The process that measures ended {child.how}: see its output above.")
        out.append((*child.begun, f"it ends the process {child.how}"))


def _serve(task: Mapping[str, Any]) -> None:
    """Measure in this process, and write messages to its parent."""
    out: dict[tuple[str, str], str] = {(subject, candidate): reason for subject, candidate, reason in task["out"]}
    places = {cell.of_subject for one in Choice.read(task["known"]).machines for cell in one.cells}
    with serving(task) as write:

        def begin(subject: RacedCall, candidate: str, action: str) -> str:
            if (subject.text, candidate) not in out:
                write({"begin": [subject.text, candidate], "text": f"{subject.text}: {candidate} {action}"})
            return out.get((subject.text, candidate), "")

        def found(cells: MeasuredOn) -> None:
            write({"row": json.loads(Choice((cells,)).to_json())})

        choose(**task["arguments"], begin=begin, found=found, known=lambda subject: subject.place in places)


if __name__ == "__main__":  # in a child of `_in_children`
    run(lambda: _serve(json.loads(sys.argv[1])))
