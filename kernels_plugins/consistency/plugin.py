"""Plugin `consistency`: the command `kernels-core consistency`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `consistency`."""
    from .command import compare_models  # only the command line needs it

    cli.command("consistency")(compare_models)
