"""All commands of the command line: those of the core, and those of the plugins that come with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from kernels_core import cli


def leaves(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command below a group, with the words that call it."""
    for name, found in getattr(command, "commands", {}).items():
        inner = f"{path} {name}".strip()
        yield from leaves(found, inner) if hasattr(found, "commands") else [(inner, found)]


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return dict(leaves(typer.main.get_command(cli.command_line())))


def test_every_command_prints_json(commands: dict[str, Any]) -> None:
    """Every command has `--json`, also those in groups and those of plugins."""
    assert commands.keys() > {"plugins", "resolve", "lock", "adopt", "cache list", "cache prune"}
    assert [name for name, c in commands.items() if not any("--json" in p.opts for p in c.params)] == []
