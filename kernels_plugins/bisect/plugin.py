"""Plugin `bisect`: the command `kernels-core bisect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `bisect`."""
    from .command import bisect_model  # only the command line needs it

    cli.command("bisect")(bisect_model)
