"""The command `kernels-core consistency`: finds the first layer whose bits differ between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernels_core import ArgumentError
from kernels_core.cli import Factory, Json, imported, print_found, printing_aside, writing

from ..choice.command import given
from ..files import write_file
from .consistency import consistency

_SETTING = "A decision file, or a function that returns a context manager (package.module:name), for the runs of {}."


def compare_models(
    a: Factory,
    b: Annotated[str, typer.Argument(help="Another, or the same.")],
    inputs: Annotated[
        str, typer.Option(help="A function that returns inputs; by default, the model's dummy_inputs.")
    ] = "",
    device: Annotated[str, typer.Option(help="Move models and inputs there first, such as cuda.")] = "",
    setting_a: Annotated[str, typer.Option(help=_SETTING.format("a"))] = "",
    setting_b: Annotated[str, typer.Option(help=_SETTING.format("b"))] = "",
    batch_a: Annotated[int | None, typer.Option(help="Rows that a gets at once; by default all.")] = None,
    batch_b: Annotated[int | None, typer.Option(help="Rows that b gets at once; by default all.")] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare backward, too.")] = False,
    seed: Annotated[int, typer.Option(help="For random numbers, in each layer.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    as_json: Json = False,
) -> None:
    """Run two models side by side, and find the first layer whose bits differ.

    Inputs are a tensor, a tuple of arguments, or a dict of named ones. The same factory twice, with other settings or
    batches, compares a model with itself. Exits with 1 where bits differ.
    """
    settings = [
        Path(place) if Path(place).is_file() else imported(place) if place else None for place in (setting_a, setting_b)
    ]
    with printing_aside():
        first, batches = given(a, inputs, device)
        if len(batches) != 1:
            raise ArgumentError(f"{inputs} makes {len(batches)} inputs: name a function that makes one.")
        args, named = batches[0]
        report = consistency(
            first,
            first if a == b else given(b, inputs, device)[0],  # a factory makes other weights each time
            named or args,
            setting_a=settings[0],
            setting_b=settings[1],
            batch_a=batch_a,
            batch_b=batch_b,
            gradients=gradients,
            seed=seed,
        )
    print_found(report, as_json)
    if html is not None:
        with writing(html):
            write_file(html, report.page().to_html())
    raise typer.Exit(0 if report.ok else 1)
