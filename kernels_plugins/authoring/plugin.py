"""Plugin `authoring`: the command `kernels-core new-plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_core import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `new-plugin`."""
    from .command import new_plugin  # only the command line needs it

    cli.command("new-plugin")(new_plugin)
