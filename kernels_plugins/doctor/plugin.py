"""Plugin `doctor`: the command `kernels-core doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `doctor`."""
    from .command import doctor  # only the command line needs it

    cli.command()(doctor)
