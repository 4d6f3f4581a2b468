"""The commands `kernels-core freeze` and `kernels-core decisions`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from ..decisions.file import DecisionFile
from ..decisions.replay import replaying_nothing
from ..errors import ArgumentError
from ..models.receipt import receipt
from .arguments import CallMode, Factory, Json, made, mode_of, printing_aside
from .printing import print_found

decisions = typer.Typer(no_args_is_help=True, help="Show and compare decision files.")


def freeze(
    factory: Factory,
    device: Annotated[str | None, typer.Option(help="Device of the calls, such as cuda.")] = None,
    mode: Annotated[list[CallMode] | None, typer.Option(help="By default both. Repeatable.")] = None,
    traced: Annotated[bool, typer.Option("--compile", help="The calls are traced by torch.compile.")] = False,
    output: Annotated[Path, typer.Option(help="The file to write, or to add to.")] = Path("kernels.decisions.json"),
    as_json: Json = False,
) -> None:
    """Write which kernel serves each layer of a model, at which commit and with which bytes, for KERNELS_DECISIONS.

    Decisions in the file for other models, hardware and modes are kept. Decides anew, also where KERNELS_DECISIONS is
    set.
    """
    if output.exists():
        DecisionFile.from_file(output)  # raises before anything is fetched
    model = made(factory)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{factory} is a {type(model).__name__}, not a module: name a model, or its factory.")
    with replaying_nothing(), printing_aside():
        # All are decided before one is written.
        found = [receipt(model, device=device, mode=mode_of(each, traced)) for each in mode or [*CallMode]]
        frozen = DecisionFile()
        for each in found:
            frozen = frozen.merged(each.decisions())
    frozen.save(output)
    print_found(frozen, as_json)
    if not as_json:
        print(f"\nIn {output}. Replay it: KERNELS_DECISIONS={output}.", file=sys.stderr)


@decisions.command()
def show(
    file: Annotated[Path, typer.Argument(help="A decision file.")],
    as_json: Json = False,
) -> None:
    """Show which kernel serves each layer, by class of hardware and mode."""
    print_found(DecisionFile.from_file(file), as_json)


@decisions.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A decision file.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Json = False,
) -> None:
    """Show the layers that two files decide otherwise, with both kernels. Exits with 1 if there is any."""
    found = DecisionFile.from_file(before).diff(DecisionFile.from_file(after))
    print_found(found, as_json)
    if found:
        raise typer.Exit(1)
