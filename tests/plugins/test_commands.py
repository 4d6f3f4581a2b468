"""All commands of the command line: those of the core, and those of the plugins that come with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kernels_core import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


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


def test_every_command_has_a_section_with_an_example(commands: dict[str, Any]) -> None:
    """docs/command-line.md has a section for each command, and for no other, and an example in each."""
    sections = dict(re.findall(r"^### `kernels-core ([\w -]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert sections.keys() == commands.keys()
    assert [name for name, text in sections.items() if f"$ kernels-core {name}" not in text] == []


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda page: page.stem)
def test_examples_name_commands_and_options_that_exist(commands: dict[str, Any], page: Path) -> None:
    """Each line of a page that calls the command line names a command, and options that it has."""
    for line in re.findall(r"^\$ kernels-core (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0].startswith("--"):  # of the application itself
            continue
        found = commands.get(words[0]) or commands.get(" ".join(words[:2]))
        assert found is not None, line
        known = {option for param in found.params for option in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
