"""Plugin `oracle`: lets references or single kernels run alone while they are compared; the command `verify`."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from kernels_core import LayerRequest, Resolution, hookimpl

from .selection import only_reference, only_selected

if TYPE_CHECKING:
    import typer


@hookimpl(tryfirst=True)
def kernels_resolve_forward(request: LayerRequest) -> Resolution | None:
    """Answer where only references are to run."""
    return only_reference(request)


@hookimpl(wrapper=True)
def kernels_find_candidates(request: LayerRequest) -> Generator[None, Any, Any]:
    """Leave out candidates where only one is to be tried."""
    return (yield from only_selected(request))


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `verify`."""
    from .command import verify_command  # only the command line needs it

    cli.command("verify")(verify_command)
