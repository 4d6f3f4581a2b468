"""Plugin `sbom`: the command `kernels-core sbom`."""

from __future__ import annotations

import typer

from kernels_core import hookimpl


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `sbom`."""
    from .command import sbom  # only the command line needs it

    cli.command()(sbom)
