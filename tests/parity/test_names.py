"""Every public name of `kernels`: there is one of ours that takes every call which theirs takes, or a reason."""

from __future__ import annotations

import inspect
import re
from enum import Enum
from inspect import Parameter
from pathlib import Path
from typing import Any

import kernels
import pytest
from parity_scene import OURS, THEIRS, Both, Side

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-kernels.md"
VERDICTS = ("same", "better", "not here")


def table() -> dict[str, str]:
    """Read the first table of the page: old names and their replacements."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| `([^`]+)` \| (\S.*?) \| \S", line):
            found[match[1]] = match[2]
    return found


def here() -> list[str]:
    """Names that are to be there in ours."""
    verdicts = table() if PAGE.is_file() else {}
    return [name for name in kernels.__all__ if verdicts.get(name) != "not here"]


@pytest.mark.parametrize("name", kernels.__all__)
def test_page_lists(name: str) -> None:
    """The page says of each public name whether it is the same, better, or not here."""
    assert table().get(name) in VERDICTS


@pytest.mark.parametrize("name", here())
def test_name(name: str) -> None:
    """Names that the page calls the same or better can be imported, and are public."""
    assert hasattr(OURS.lib, name)
    assert name in OURS.lib.__all__


@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name not in here()])
def test_name_that_is_not_here(name: str) -> None:
    """Names that the page calls missing are missing."""
    assert not hasattr(OURS.lib, name)


CALLABLE = [
    name
    for name in here()
    if callable(getattr(kernels, name))
    and not (isinstance(getattr(kernels, name), type) and issubclass(getattr(kernels, name), Enum))
    and name != "Metadata"  # made by the library alone
]


def is_accepted(theirs: Parameter, ours: dict[str, Parameter], position: int) -> str:
    """Tell why a parameter of ours does not take what this one takes; nothing if it does."""
    if theirs.kind is Parameter.VAR_POSITIONAL:
        return "" if any(parameter.kind is theirs.kind for parameter in ours.values()) else "no *args"
    parameter = ours.get(theirs.name)
    if parameter is None:
        return f"no parameter {theirs.name}"
    kinds = {
        Parameter.POSITIONAL_OR_KEYWORD: (Parameter.POSITIONAL_OR_KEYWORD,),
        Parameter.KEYWORD_ONLY: (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY),
    }[theirs.kind]
    if parameter.kind not in kinds:
        return f"{theirs.name} is {parameter.kind.description}"
    if theirs.kind is Parameter.POSITIONAL_OR_KEYWORD and list(ours).index(theirs.name) != position:
        return f"{theirs.name} is at another place"
    if theirs.default is not Parameter.empty and _value(parameter.default) != _value(theirs.default):
        return f"{theirs.name} has the default {parameter.default!r}, not {theirs.default!r}"
    return ""


def _value(default: object) -> object:
    return default.name if isinstance(default, Enum) else default


@pytest.mark.parametrize("name", CALLABLE)
def test_signature(name: str) -> None:
    """Ours takes every call that theirs takes: names, kinds, places and defaults of the parameters."""
    theirs, ours = (dict(inspect.signature(getattr(side.lib, name)).parameters) for side in (THEIRS, OURS))
    problems = [is_accepted(parameter, ours, number) for number, parameter in enumerate(theirs.values())]
    wanted = {
        parameter.name
        for parameter in ours.values()
        if parameter.default is Parameter.empty
        and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }
    assert [problem for problem in problems if problem] == []
    assert wanted <= theirs.keys(), "ours wants what theirs does not know"


ATTRIBUTES = {
    "LoadedKernel": ("metadata", "module", "repo_info"),
    "RepoInfo": ("repo_id", "revision"),
    "VariantAccepted": ("variant",),
    "VariantRejected": ("variant", "reason"),
    "CUDAProperties": ("min_capability", "max_capability"),
    "ROCMProperties": ("min_capability", "max_capability"),
    "Device": ("type", "properties"),
}


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_attributes(name: str) -> None:
    """Values of ours have the fields of theirs."""
    fields = {
        getattr(side.lib, name): set(inspect.signature(getattr(side.lib, name)).parameters) for side in (THEIRS, OURS)
    }
    for cls, found in fields.items():
        assert set(ATTRIBUTES[name]) <= found, cls


METADATA = (
    "id",
    "name",
    "version",
    "kernels_minver",
    "license",
    "upstream",
    "source",
    "python_depends",
    "kernel_depends",
    "backend",
    "digest",
    "provenance",
)


def test_metadata_is_read(both: Both, tmp_path: Path) -> None:
    """Both read metadata from a file and from bytes."""
    import json

    from kernels_plugins.local_hub.testing import kernel_metadata

    text = json.dumps(
        kernel_metadata("my-kernel", {}, changes={"upstream": "https://example.com/there", "kernels-minver": "0.10.0"})
    )
    (tmp_path / "metadata.json").write_text(text)

    def scenario(side: Side) -> list[object]:
        read = side.lib.Metadata
        both_ways = [read.read_from_file(tmp_path / "metadata.json"), read.from_bytes(text.encode())]
        for metadata in both_ways:
            for name in METADATA:
                getattr(metadata, name)
        return [(str(m.name), m.name.python_name, m.upstream, str(m.kernels_minver), m.version) for m in both_ways]

    both.run(scenario).agree([("my-kernel", "my_kernel", "https://example.com/there", "0.10.0", 1)] * 2)


def test_metadata_that_is_none(both: Both) -> None:
    """Both refuse bytes that are no metadata with a ValueError."""
    both.run(lambda side: side.lib.Metadata.from_bytes(b"{}")).refuse(ValueError)


def test_version() -> None:
    """Both tell their version as a text of numbers."""
    for side in (THEIRS, OURS):
        version: Any = side.lib.__version__
        assert re.match(r"\d+\.\d+", version)


COMMANDS = ("lock", "download", "info", "versions", "benchmark", "check", "verify-signature")
VARIABLES = (
    "KERNELS_CACHE",
    "LOCAL_KERNELS",
    "DISABLE_KERNEL_MAPPING",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
)


@pytest.mark.parametrize("name", [f"kernels {command}" for command in COMMANDS] + list(VARIABLES))
def test_page_lists_commands_and_variables(name: str) -> None:
    """The page says the same of each command and each environment variable, and lists no command that is not."""
    assert table().get(name) in VERDICTS


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    """A command is there if the page says so."""
    import typer

    from kernels_core.cli import command_line

    ours = typer.main.get_command(command_line()).commands  # type: ignore[attr-defined]
    assert (command in ours) is (table()[f"kernels {command}"] != "not here")


def test_these_are_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The list above is that of their command line."""
    from kernels.cli import main

    monkeypatch.setattr("sys.argv", ["kernels", "--help"])
    with pytest.raises(SystemExit):
        main()
    listed = re.search(r"\{([^}]*)\}", capsys.readouterr().out)
    assert listed is not None and set(listed[1].split(",")) == set(COMMANDS)


def test_page_lists_every_difference() -> None:
    """Each test of a difference has a line in the second table, and each line has its test."""
    source = (Path(__file__).parent / "test_differences.py").read_text()
    tests = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    assert sorted(re.findall(r"\| `(test_\w+)` \|$", PAGE.read_text(), re.MULTILINE)) == sorted(tests)
