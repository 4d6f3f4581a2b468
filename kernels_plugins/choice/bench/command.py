"""The command `kernels-core bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kernels_core import ArgumentError
from kernels_core.cli import Json, print_found, printing_aside, run, writing

from ...files import write_file
from ...oracle.report import new_figure
from ..cell import CONTEXTS, Context
from ..choosing import check_options
from ..command import PATIENCE, Begin, check_patience, given, in_children, serve
from ..race import MODES, ModeName
from .report import BenchReport, BenchRow
from .sweep import MEASURED, ROWS, check_sizes, described, swept


def bench_command(
    factory: Annotated[str, typer.Argument(help="A module, a function that makes one, or a decorated function.")],
    inputs: Annotated[str, typer.Option(help="A function that returns a list of inputs, as package.module:name.")] = "",
    device: Annotated[str, typer.Option(help="Move model and inputs there first, such as cuda.")] = "",
    layer: Annotated[list[str] | None, typer.Option(help="Only layers of this name. Repeatable.")] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows; given for those of the inputs.")] = ",".join(
        map(str, ROWS)
    ),
    mode: Annotated[list[str] | None, typer.Option(help="inference or training; by default both. Repeatable.")] = None,
    context: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CONTEXTS)}; by default {' and '.join(MEASURED)}. Repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For the timing of each candidate at each size.")] = 0.2,
    patience: Annotated[float, typer.Option(help="Seconds after which a candidate hangs, and is left out.")] = PATIENCE,
    markdown: Annotated[Path | None, typer.Option(help="Write tables in Markdown; - prints them.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the times, as multiples of the reference.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw GB/s over rows; needs matplotlib.")] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run in this process, for a debugger: a crash ends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time every candidate for the layers of a model at several sizes, against the reference and a copy.

    An undecorated model is adopted first. Each input is a tensor, a tuple of arguments, or a dict of named ones;
    without --inputs, the dummy_inputs of the model. Only candidates that are right are timed. Exits with 1 where one is
    wrong, raises, hangs or ends its process.
    """
    check_options(context or MEASURED, seconds, mode or [*MODES])
    check_patience(patience)
    sizes = _sizes(rows)
    check_sizes(sizes, layer)
    printed = markdown is not None and str(markdown) == "-"
    if printed and as_json:
        raise ArgumentError("--markdown - and --json both print: write one of them to a file.")
    if png is not None:
        new_figure(1)  # raises before anything is measured, where matplotlib is not installed
    arguments: dict[str, Any] = {
        "factory": factory,
        "inputs": inputs,
        "device": device,
        "rows": sizes,
        "layers": layer,
        "modes": mode or [*MODES],
        "contexts": context or [*MEASURED],
        "seconds": seconds,
    }
    found: list[Any] = []
    if in_process:
        measure(**arguments, begin=lambda subject, candidate, action: "", found=found.append)
    else:
        found = in_children("kernels_plugins.choice.bench.command", "bench", arguments, patience)
    machine: dict[str, str] = found[0]["machine"]
    report = BenchReport(tuple(BenchRow(**row) for one in found for row in one["rows"]), machine)
    if printed:
        print(report.to_markdown(), end="")
    else:
        print_found(report, as_json)
    for path, text in ((markdown, report.to_markdown), (html, report.to_html), (svg, report.to_svg)):
        if path is not None and str(path) != "-":
            with writing(path):
                write_file(path, text())
    if png is not None:
        with writing(png):
            report.plot(png)
    raise typer.Exit(0 if report.ok else 1)


def _sizes(text: str) -> list[int] | None:
    if text == "given":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--rows is {text!r}: give numbers with commas between them, or given.") from error


def measure(
    factory: str,
    inputs: str,
    device: str,
    rows: Sequence[int] | None,
    layers: Sequence[str] | None,
    modes: Sequence[ModeName],
    contexts: Sequence[Context],
    seconds: float,
    begin: Begin,
    found: Callable[[Any], object],
    known: Sequence[Any] = (),
) -> None:
    """Time the layers of a model that is named by its factory; `found` gets each size, and `known` has what it got."""
    model, batches = given(factory, inputs, device)
    done = [BenchRow(**row) for one in known for row in one["rows"]]
    with printing_aside():
        machine = described(model, batches)
        for of_size in swept(model, batches, rows, layers, modes, contexts, seconds, begin, done):
            found({"machine": machine, "rows": [vars(row) for row in of_size]})


if __name__ == "__main__":  # in a child of `in_children`
    run(lambda: serve(json.loads(sys.argv[1]), measure))
