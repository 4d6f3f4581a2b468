"""Plugin `adopt`: the rules that come with kernels-core, and the command `kernels-core adopt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kernels_core import ConfigSection, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl(trylast=True)  # rules of other plugins come first
def kernels_adoption_rules() -> Sequence[object]:
    """Offer the shipped rules."""
    from .shipped import RULES  # not needed before a model is adopted
    from .shipped_parents import PARENT_RULES

    return (*RULES, *PARENT_RULES)


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `adoption` and `packs` in the configuration file."""
    from ..packs.order import parse_order  # only where there is such a file
    from .rule import parse_rules

    return {"adoption": parse_rules, "packs": parse_order}


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `adopt`."""
    from .command import adopt_model  # only the command line needs it

    cli.command("adopt")(adopt_model)
