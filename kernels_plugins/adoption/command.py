"""The command `kernels-core adopt`: the layers of a model that would be adopted, refused and served."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from kernels_core import ArgumentError
from kernels_core import as_json as to_json
from kernels_core.cli import Factory, Json, made, print_found, printing_aside, using_device

from .adopted import adopt


def adopt_model(
    factory: Factory,
    device: Annotated[str, typer.Option(help="Of the calls, such as cuda; by default that of the model.")] = "",
    served: Annotated[bool, typer.Option("--served", help="Show the receipt, too: who serves each layer.")] = False,
    as_json: Json = False,
) -> None:
    """Show the layers of an undecorated model that `adopt` would make dispatch, and why it leaves others alone.

    Exits with 1 where no layer is adopted.
    """
    from torch import nn

    model = made(factory)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{factory} is a {type(model).__name__}, not a module: name a model, or its factory.")
    with printing_aside():
        adopted = adopt(model)
    receipt = None
    if served:
        with using_device(device) if device else nullcontext() as where, printing_aside():
            receipt = adopted.receipt(device=where)
    if as_json:
        rows = {} if receipt is None else {"receipt": receipt.rows}
        print(to_json({**adopted.lists(), **rows}))
    else:
        for found in filter(None, (adopted, receipt)):
            print_found(found)
    raise typer.Exit(0 if adopted.layers else 1)
