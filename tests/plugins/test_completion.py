"""Completion in a shell: from a kept outline, without importing PyTorch, with the words of the real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from kernels_core import cli
from kernels_plugins.shell import completion, outline
from kernels_plugins.shell.command import _outline

MAIN = "from kernels_plugins.shell.command import main"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KERNELS_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def options(command: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yield the words of each command that begin with dashes."""
    for name, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from options(found, f"{path}{name} ")
        else:
            yield path + name, {word for param in found.params for word in (*param.opts, *param.secondary_opts)}


def test_the_outline_has_the_words_of_the_command_line() -> None:
    """The application made from the outline has the commands and options of the real one, but for hidden ones."""
    app = cli.command_line()
    kept = json.loads(json.dumps(_outline(app)))
    real, made = (dict(options(typer.main.get_command(a))) for a in (app, completion.application(kept)))
    real["demo"] -= {"--repository"}
    assert made == real
    assert "RMSNorm" in kept["layers"]


def test_an_outline_of_other_packages_is_not_used(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """What was kept is found again, and no longer once plugins differ or the file is damaged."""
    outline.keep_outline({"commands": {}})
    assert outline.find_outline() is not None
    monkeypatch.setenv("KERNELS_PLUGINS", "-hub")
    assert outline.find_outline() is None
    monkeypatch.delenv("KERNELS_PLUGINS")
    (file,) = (place / "kernels-core" / "commands").iterdir()
    for text in ("{", "[]", "\xff"):
        file.write_text(text, encoding="latin-1")
        assert outline.find_outline() is None


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in some containers, has the command line all the same."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    outline.keep_outline({"commands": {}})
    assert outline.find_outline() is None


def test_a_command_of_any_signature_is_described() -> None:
    """Flags with two names, lists, choices without annotation and groups in groups become words."""
    app, inner = typer.Typer(), typer.Typer()

    @inner.command("go")
    def go(
        where: Annotated[list[str] | None, typer.Argument(help="Places.")] = None,
        fast: Annotated[bool, typer.Option("--fast/--slow")] = False,
        mode: cli.CallMode = cli.CallMode.inference,
        count: int = 3,
    ) -> None:
        """Go there.

        More.
        """

    app.add_typer(inner, name="trip")
    described = outline.describe(app)["commands"]["trip"]["commands"]["go"]
    assert described["help"] == "Go there."
    assert [param["many"] for param in described["params"]] == [True, False, False, False]
    assert described["params"][2]["choices"] == ["inference", "training"]
    words = dict(options(typer.main.get_command(completion.application(outline.describe(app)))))
    assert words["trip go"] > {"--fast", "--slow", "--mode", "--count"}


ASK = f"""
import contextlib, io, json, os, sys
{MAIN}
answers = []
for shell, variable, words in json.loads(sys.argv[1]):
    os.environ.update(_KERNELS_CORE_COMPLETE=f"complete_{{shell}}", _TYPER_COMPLETE_FISH_ACTION="get-args")
    os.environ.update({{variable: words, "COMP_CWORD": str(len(words.split(" ")) - 1)}})
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main()
    answers.append(text.getvalue())
print(json.dumps([answers, [name for name in ("torch", "kernels_core", "huggingface_hub") if name in sys.modules]]))
"""


def test_shells_get_words_without_pytorch(place: Path) -> None:
    """Commands, options, choices, layer names and cached kernels complete in bash, zsh and fish; PyTorch stays out."""
    outline.keep_outline(_outline(cli.command_line()))
    (place / "huggingface" / "hub" / "kernels--acme--gate").mkdir(parents=True)
    bash, other = "COMP_WORDS", "_TYPER_COMPLETE_ARGS"
    questions = [
        ("bash", bash, "kernels-core cache l", ["list"]),
        ("bash", bash, "kernels-core resolve RMSNormO", ["RMSNormOffset"]),
        ("bash", bash, "kernels-core resolve RMSNorm --mode t", ["training"]),
        ("bash", bash, "kernels-core cache verify ac", ["acme/gate"]),
        ("bash", bash, "kernels-core new-plugin x --l", ["--layer"]),
        ("zsh", other, "kernels-core cache l", ['"list"']),
        ("fish", other, "kernels-core new-", ["new-plugin"]),
    ]
    command = [sys.executable, "-c", ASK, json.dumps([question[:3] for question in questions])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    answers, imported = json.loads(done.stdout)
    for (shell, _, words, expected), answer in zip(questions, answers, strict=True):
        found = answer.split() if shell == "bash" else answer
        assert found == expected if shell == "bash" else expected[0] in found, (words, answer)
    assert imported == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script_that_is_shown(place: Path) -> None:
    """With the script that `--show-completion bash` prints, bash completes; the first command keeps the outline."""
    program = place / "bin" / "kernels-core"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{MAIN}; main()' \"$@\"\n")
    program.chmod(0o755)
    script = (
        'eval "$(kernels-core --show-completion bash)"; COMP_WORDS=(kernels-core new); COMP_CWORD=1; '
        "_kernels_core_completion kernels-core; echo ${COMPREPLY[@]}"
    )
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=place)
    assert done.stdout == "new-plugin\n", done.stderr
    assert outline.find_outline() is not None
