"""`kernels-core new-plugin`: a package that installs and passes its tests as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kernels_core import ArgumentError
from kernels_plugins.authoring import command
from kernels_plugins.authoring.package import Names, render, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def new_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command in an empty folder, and return its output."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command.new_plugin)

    def run(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    return run


@pytest.mark.slow
def test_it_installs_into_an_empty_environment_and_passes_its_tests(
    tmp_path: Path, new_plugin: Callable[..., str]
) -> None:
    """Built by pip and installed where only kernels-core is, its own tests, its style and its types pass."""
    new_plugin("acme-kernels")
    folder, home = tmp_path / "acme-kernels", tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = str(home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    site = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    # The packages of this environment, without its own .pth files: pip has no index to install them from.
    (Path(site) / "base.pth").write_text("\n".join([str(ROOT), *(p for p in sys.path if "-packages" in p)]))

    def run(*arguments: str) -> str:
        # Away from the sources of this project, which are no package to be found by accident.
        done = subprocess.run([python, "-m", *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run("pip", *install, ".")
    shown = run("pytest", "-p", "no:cacheprovider")
    assert " passed" in shown
    import torch

    if not torch.cuda.is_available():
        assert re.search(r"SKIPPED .*there is no CUDA GPU", shown), "the reason is printed"
    for tool in (["mypy"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        if subprocess.run([python, "-m", tool[0], "--version"], capture_output=True).returncode == 0:
            run(*tool)


def test_the_next_steps_are_printed(new_plugin: Callable[..., str], tmp_path: Path) -> None:
    """The output lists the files and the steps that follow, as text or JSON; another layer name is a reminder."""
    text = new_plugin("Acme.Gates", "--layer", "Gate", "--directory", "a folder")
    assert "cd 'a folder'" in text and "pip install -e" in text
    assert "write the forward of Gate as the reference" in text
    assert (tmp_path / "a folder" / "acme_gates" / "triton_kernel.py").is_file()
    told = json.loads(new_plugin("acme-more", "--json"))
    assert told["plugin"] == "acme-more" and "pyproject.toml" in told["files"] and told["next"][0] == "cd acme-more"
    assert sorted(os.listdir(tmp_path)) == ["a folder", "acme-more"]


def test_no_placeholder_is_left_and_all_code_compiles() -> None:
    """Every template is filled in, tools' files have their dots, and the minimum kernels-core is this one."""
    files = render(Names("Zeta_9.kernels", "SiluAndMul"))
    assert files.keys() > {".gitignore", ".github/workflows/tests.yml", "LICENSE", "zeta_9_kernels/py.typed"}
    for path, text in files.items():
        assert not re.search(r"@[A-Z]+@", text + path), path
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert re.search(r'dependencies = \["kernels-core>=\d', files["pyproject.toml"])
    assert '"zeta-9-kernels" = "zeta_9_kernels"' in files["pyproject.toml"]


WRONG = {
    "-x": "is no name of a package",
    "acme kernels": "is no name of a package",
    "a/b": "is no name of a package",
    "": "is no name of a package",
    "acmé": "is no name of a package",
    "9lives": "no identifier",
    "class": "a keyword",
    "json": "belongs to the standard library",
    "torch": "is installed, and would be replaced",
    "kernels-core": "is installed, and would be replaced",
    "_pytest": "is no name of a package",
    "kernels.plugins": "there is a module 'kernels_plugins' already",
    "mapping": "the plugin 'mapping' of kernels-core has that name",
    "tests": "its tests have the folder of that name",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_hides_something_is_refused(name: str) -> None:
    """A name that pip or Python would not take, or that hides a module, a distribution or a plugin, is an error."""
    with pytest.raises(ArgumentError, match=re.escape(WRONG[name])):
        Names(name, "RMSNorm")


@pytest.mark.parametrize("layer", ["", "RMS Norm", "class", "a.b", "1st"])
def test_a_layer_that_names_no_class_is_refused(layer: str) -> None:
    """Classes are named after the layer."""
    with pytest.raises(ArgumentError, match="--layer is"):
        Names("acme-kernels", layer)


def test_all_is_written_or_nothing(tmp_path: Path) -> None:
    """A folder with something in it stays as it is, an empty one is filled, and an error leaves nothing behind."""
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="is not empty"):
        write({"a": "x"}, full)
    with pytest.raises(ArgumentError, match="is not empty"):
        write({"a": "x"}, full / "mine.txt")
    with pytest.raises(ArgumentError, match="Cannot write"):
        write({"a": "x", "a/b": "a file cannot be a folder"}, tmp_path / "new")
    write({"inner/a": "x"}, empty)
    assert (empty / "inner" / "a").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"] and os.listdir(full) == ["mine.txt"]
