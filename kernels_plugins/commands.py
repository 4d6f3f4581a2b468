"""Plugins that only add a command: its module is imported where the command line starts, and not before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


def adding(place: str, name: str | None = None) -> Callable[[typer.Typer], None]:
    """Return the hook that adds a command: the function at a place in this package, `doctor.command:doctor`."""
    module, _, function = place.partition(":")

    @hookimpl
    def kernels_register_commands(cli: typer.Typer) -> None:
        cli.command(name)(getattr(importlib.import_module(f"{__package__}.{module}"), function))

    return kernels_register_commands
