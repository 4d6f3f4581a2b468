"""The command `kernels-core verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kernels_core import ArgumentError
from kernels_core.cli import Json, made, print_error, print_found, printing_aside, run, with_inputs, writing

from ..numerics.properties import check_names
from .isolated import in_children, serve
from .report import VerifyReport, VerifyRow
from .subject import Plan
from .verify import verify_each


def verify_command(
    factory: Annotated[str, typer.Argument(help="A module, a function that makes one, or a decorated function.")],
    inputs: Annotated[str, typer.Option(help="A function that returns the inputs, as package.module:name.")] = "",
    device: Annotated[str, typer.Option(help="Move model and inputs there first, such as cuda.")] = "",
    gradients: Annotated[bool, typer.Option(help="Whether to compare training, too.")] = True,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Compare only in this dtype, such as bfloat16; repeatable.")
    ] = None,
    numerics: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Find out, too: batch_invariant, for example; repeatable.")
    ] = None,
    every_size: Annotated[
        bool, typer.Option("--every-size", help="For batch_invariant, try every number of rows.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run kernels in this process, for a debugger: a crash ends it.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw how the errors are distributed; needs matplotlib.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Exit with 1, too, if a layer or a kernel was not compared.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every kernel that is offered for the layers of a model with their references.

    Inputs are a tensor, a tuple of arguments, or a dict of named ones; without --inputs, the dummy_inputs of the
    model. Exits with 1 where a kernel is wrong, ends its process, or cannot be offered because a plugin failed. Each
    case is shown before it runs.
    """
    model = {"factory": factory, "inputs": inputs, "device": device}
    found = {"gradients": gradients, "dtypes": dtype, "numerics": numerics, "every_size": every_size}
    arguments: dict[str, Any] = {**model, **found}
    report: VerifyReport | int = compared(**arguments) if in_process else in_children(arguments)
    if isinstance(report, int):
        raise typer.Exit(report)
    if plot is not None:
        with writing(plot):
            report.plot(plot)
    print_found(report, as_json)
    incomplete = complete and (report.gaps or not report.rows)
    if incomplete:
        lines = "\n".join(f"  {row}" for row in report.gaps)
        print_error(f"not everything was compared:\n{lines or f'  {report}'}")
    raise typer.Exit(1 if incomplete or not report.ok else 0)


def compared(
    factory: str,
    inputs: str = "",
    device: str = "",
    gradients: bool = True,
    dtypes: Sequence[str] | None = None,
    numerics: Sequence[str] | None = None,
    every_size: bool = False,
    begin: Callable[[VerifyRow], bool] = lambda row: True,
    found: Callable[[VerifyRow], object] = lambda row: None,
) -> VerifyReport:
    """Compare the kernels of a model that is named by its factory: see `Plan`; `found` is called with each row."""
    model, given = with_inputs(made(factory), inputs, device)
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
    names = check_names(numerics or (), "--numerics")
    plan = Plan(
        gradients, [_dtype(name) for name in dtypes or ()] or None, numerics=names, every_size=every_size, begin=begin
    )
    rows = []
    with printing_aside():
        values = args if isinstance(args, tuple | list) else (args,)
        for row in verify_each(model, values, kwargs, plan):
            found(row)
            rows.append(row)
    return VerifyReport(tuple(rows))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"--dtype is {name!r}: name a dtype of PyTorch, such as float32 or bfloat16.")
    return dtype


if __name__ == "__main__":  # in a child of `in_children`
    run(lambda: serve(json.loads(sys.argv[1]), compared))
