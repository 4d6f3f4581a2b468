"""The command `kernels-core bisect`: finds the kernels that change a number computed from a model."""

from __future__ import annotations

from typing import Annotated

import typer

from kernels_core.cli import Factory, Json, imported, made, print_found, printing_aside

from .bisection import bisect


def bisect_model(
    model: Factory,
    metric: Annotated[str, typer.Argument(help="A function of the model that returns a number, in the same form.")],
    tolerance: Annotated[float, typer.Option(help="How far the number may be from that on references.")],
    relative: Annotated[float, typer.Option(help="A share of that number that is allowed besides.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Find the kernels that change a metric of a model beyond a tolerance.

    Runs some layers on their kernels and all others on their reference, in O(k log n) evaluations for k culprits
    among n kernels. Exits with 1 where there are culprits.
    """
    measured = imported(metric)
    with printing_aside():
        result = bisect(made(model), measured, tolerance=tolerance, relative=relative)
    print_found(result, as_json)
    raise typer.Exit(0 if result.ok else 1)
