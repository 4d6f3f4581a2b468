"""The command `kernels-core verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from kernels_core import ArgumentError
from kernels_core.cli import Json, made, print_error, print_found, printing_aside, using_device, writing
from kernels_core.replay import mapped

from .verify import verify


def verify_command(
    factory: Annotated[str, typer.Argument(help="A module, a function that makes one, or a decorated function.")],
    inputs: Annotated[str, typer.Option(help="A function that returns the inputs, as package.module:name.")] = "",
    device: Annotated[str, typer.Option(help="Move model and inputs there first, such as cuda.")] = "",
    gradients: Annotated[bool, typer.Option(help="Whether to compare training, too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw how the errors are distributed; needs matplotlib.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Exit with 1, too, if a layer or a kernel was not compared.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every kernel that is offered for the layers of a model with their references.

    Inputs are a tensor, a tuple of arguments, or a dict of named ones; without --inputs, the dummy_inputs of the
    model. Exits with 1 where a kernel is wrong.
    """
    model = made(factory)
    given = _given(model, inputs)
    if device:
        with using_device(device) as where:
            given = mapped(given, lambda _, leaf: leaf.to(where) if isinstance(leaf, torch.Tensor) else leaf)
            model = model.to(where) if isinstance(model, nn.Module) else model
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
    with printing_aside():
        report = verify(model, *(args if isinstance(args, tuple | list) else (args,)), gradients=gradients, **kwargs)
    if plot is not None:
        with writing(plot):
            report.plot(plot)
    print_found(report, as_json)
    incomplete = complete and (report.gaps or not report.rows)
    if incomplete:
        lines = "\n".join(f"  {row}" for row in report.gaps)
        print_error(f"not everything was compared:\n{lines or f'  {report}'}")
    raise typer.Exit(1 if incomplete or not report.ok else 0)


def _given(model: Any, place: str) -> Any:
    if place:
        return made(place, "inputs")
    dummy = getattr(model, "dummy_inputs", None)
    if dummy is None:
        raise ArgumentError(
            "The inputs of the model are not known, for it has no dummy_inputs: name a function that returns them, "
            "with --inputs package.module:function."
        )
    return dummy
