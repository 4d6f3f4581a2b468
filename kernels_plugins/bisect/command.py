"""The command `kernels-core bisect`: which kernels change a number that a model gives."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from kernels_core import ArgumentError
from kernels_core.cli import Json

from .bisection import bisect


def bisect_model(
    model: Annotated[str, typer.Argument(help="A module, or what makes one, as package.module:name.")],
    metric: Annotated[str, typer.Argument(help="A function of the model that returns a number, in the same form.")],
    tolerance: Annotated[float, typer.Option(help="How far the number may be from that on references.")],
    relative: Annotated[float, typer.Option(help="What share of it is allowed besides.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Find the kernels that change a metric of a model beyond a tolerance.

    Runs some layers on their kernels and all others on their reference, in O(k log n) evaluations for k culprits
    among n kernels. Exits with 1 where there are culprits.
    """
    made = _imported(model)
    measured = _imported(metric)
    result = bisect(
        made if isinstance(made, torch.nn.Module) else _made(model, made),
        measured,
        tolerance=tolerance,
        relative=relative,
    )
    if as_json:
        print(result.to_json())
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(result if console.is_terminal else Text(str(result)))
    raise typer.Exit(0 if result.ok else 1)


def _made(place: str, factory: Any) -> Any:
    """Let a factory make a model."""
    try:
        return factory()
    except Exception as error:
        raise ArgumentError(f"{place!r} makes no model: {type(error).__name__}: {error}") from error


def _imported(place: str) -> Any:
    """Import `package.module:name`, also from the current directory."""
    module_name, _, qualname = place.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for name in qualname.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise ArgumentError(f"Cannot import {place!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    return found
