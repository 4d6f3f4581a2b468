"""Plugin `oracle`: the command `kernels-core verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `verify`."""
    from .command import verify_command  # only the command line needs it

    cli.command("verify")(verify_command)
