"""Whose lock counts: packages that were built and installed, in place or not, checkouts, scripts and prompts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import packaging
import pytest
from fresh_process import run_python
from packaging.version import Version

from kernels_core import ArgumentError
from kernels_plugins.hub.locking.caller import Caller, find_caller, find_lock
from kernels_plugins.hub.locking.lockfile import Dependency, Lock, LockedKernel, write_lock
from kernels_plugins.hub.locking.project import read_dependencies

ROOT = Path(__file__).resolve().parents[2]
COMMIT, OTHER = "0a" * 20, "1b" * 20
HASHES = (("torch-cpu", f"sha256-{'ab' * 32}"),)
DEPENDENCIES = '[tool.kernels.dependencies]\n"acme/silu" = 1\n'
PYPROJECT = (
    '[build-system]\nrequires = ["setuptools", "kernels-core"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "tiny-{name}"\nversion = "1.0"\n[tool.setuptools]\npackages = ["{name}"]\n'
)
MODULE = (
    "from kernels_plugins.hub.locking.caller import find_caller, find_lock\nask = lambda: find_lock(find_caller())\n"
)


def lock(commit: str = COMMIT) -> Lock:
    return Lock((LockedKernel(Dependency("acme/silu", version=1), commit, HASHES),))


def project(folder: Path, name: str = "tiny", tail: str = DEPENDENCIES) -> Path:
    """Write a project whose package asks for its lock."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(MODULE)
    (folder / name / "__main__.py").write_text(f"from {name} import ask\nprint(ask().kernels[0].commit)\n")
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name) + tail)
    return folder


def run(*command: object, where: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=environment, cwd=where, capture_output=True, text=True)


def pip(*command: object, where: Path, path: str = "") -> None:
    done = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *command, where=where, path=path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this very project is installed, as it would be in an environment that builds others."""
    if Version(packaging.__version__) < Version("24.2"):
        pytest.skip("setuptools cannot read a licence expression with this packaging: it wants 24.2 to build with")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kernels_core", "kernels_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("--target", site, source, where=source)
    return site


@pytest.fixture
def ask(site: Path) -> Callable[..., str]:
    """Ask in a new process, of an installed package or a file."""

    def ask(*command: str, where: Path, path: Path | str = "") -> str:
        environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{site}", "PYTHONWARNINGS": "ignore"}
        done = run_python(*command, environment=environment, folder=where)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    return ask


# --- Packages that were built --------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_package_finds_its_own_lock(tmp_path: Path, site: Path, ask: Callable[..., str]) -> None:
    """A package that setuptools built has lock and hashes in its metadata, and asks for them from anywhere."""
    source, target = project(tmp_path / "source"), tmp_path / "target"
    write_lock(source / "kernels.lock", lock())
    pip("--target", target, source, where=tmp_path, path=str(site))
    shutil.rmtree(source)
    (metadata,) = target.glob("tiny_tiny-*.dist-info")
    assert {"kernels.lock", "kernels.hashes"} <= {file.name for file in metadata.iterdir()}
    assert ask("-m", "tiny", where=tmp_path, path=target) == COMMIT
    assert ask("-c", "import tiny; print(len(tiny.ask().kernels[0].hashes))", where=tmp_path, path=target) == "1"


@pytest.mark.slow
def test_a_package_in_place_finds_the_lock_of_now(tmp_path: Path, site: Path, ask: Callable[..., str]) -> None:
    """Of an editable install, the file in the checkout counts, also after it was locked anew."""
    source, target = project(tmp_path / "source"), tmp_path / "target"
    write_lock(source / "kernels.lock", lock())
    pip("--prefix", target, "-e", source, where=tmp_path, path=str(site))
    (packages,) = target.rglob("site-packages")
    code = f"import site; site.addsitedir({str(packages)!r}); import tiny; print(tiny.ask().kernels[0].commit)"
    assert ask("-c", code, where=tmp_path) == COMMIT
    write_lock(source / "kernels.lock", lock(OTHER))
    assert ask("-c", code, where=tmp_path) == OTHER


def test_the_writer_imports_nothing_heavy(tmp_path: Path) -> None:
    """Builds of all projects import the writer: it brings neither torch, nor the Hub's client, nor any plugin."""
    entries = re.findall(r'^"kernels\.\w+" = "([\w.:]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert entries == ["kernels_plugins.hub.locking.writer:write_metadata"] * 2
    program = "import sys; before = set(sys.modules); import kernels_plugins.hub.locking.writer as writer; "
    program += "print(*sorted(set(sys.modules) - before))"
    done = run("-c", program, where=tmp_path, path=str(ROOT))
    loaded = [name for name in done.stdout.split() if name.partition(".")[0] not in {*sys.stdlib_module_names, "tomli"}]
    packages = ["kernels_plugins", "kernels_plugins.hub", "kernels_plugins.hub.locking"]
    assert loaded == [*packages, "kernels_plugins.hub.locking.writer"], done.stderr


@pytest.mark.slow
def test_builds_of_other_projects_are_left_alone(tmp_path: Path, site: Path) -> None:
    """A project without kernels, and one without pyproject.toml, are built as ever; torch is not imported."""
    plain = project(tmp_path / "plain", tail="")
    write_lock(plain / "kernels.lock", lock())
    (tmp_path / "bare" / "bare").mkdir(parents=True)
    (tmp_path / "bare" / "setup.py").write_text("from setuptools import setup\nsetup(name='bare', version='1')\n")
    probe = (
        "import sys, setuptools; sys.argv = ['setup.py', '-q', 'egg_info']; setuptools.setup(name='tiny', version='1')"
    )
    for folder in (plain, tmp_path / "bare"):
        done = run(
            "-c", f"{probe}; print({{'torch', 'kernels_core'}} & set(sys.modules))", where=folder, path=str(site)
        )
        assert done.stdout.strip() == "set()", done.stderr
        assert not list(folder.rglob("*.egg-info/kernels.*"))


@pytest.mark.slow
def test_a_lock_that_is_gone_leaves_the_metadata(tmp_path: Path, site: Path) -> None:
    """Built again without its lock, a project warns, and its metadata has no lock of before."""
    source = project(tmp_path / "source")
    write_lock(source / "kernels.lock", lock())
    command = ("-c", "import sys, setuptools; sys.argv = ['setup.py', 'egg_info']; setuptools.setup()")
    run(*command, where=source, path=str(site))
    assert len(list(source.rglob("*.egg-info/kernels.*"))) == 2
    (source / "kernels.lock").unlink()
    (source / "kernels.hashes").unlink()
    done = run(*command, where=source, path=str(site))
    assert "run `kernels-core lock .`" in done.stderr + done.stdout
    assert not list(source.rglob("*.egg-info/kernels.*"))


# --- Checkouts, scripts, prompts -----------------------------------------------------------------


def module(folder: Path, name: str, source: str) -> Caller:
    """Write a module and return who it is."""
    (folder / f"{name}.py").write_text(source)
    return Caller(name, folder / f"{name}.py")


def test_a_checkout_finds_the_lock_of_its_project(tmp_path: Path) -> None:
    """Code that is not installed has the lock beside the nearest pyproject.toml above it."""
    source = project(tmp_path / "source")
    write_lock(source / "kernels.lock", lock())
    (source / "tests" / "deep").mkdir(parents=True)
    assert find_lock(module(source / "tests" / "deep", "check", "")) == lock()
    (source / "tests" / "pyproject.toml").write_text("")
    with pytest.raises(ArgumentError, match=r"beside a pyproject.toml above"):
        find_lock(module(source / "tests" / "deep", "check", ""))


def test_the_environment_in_a_project_is_not_the_project(tmp_path: Path) -> None:
    """Packages in a project's own environment do not get that project's lock."""
    source = project(tmp_path / "source")
    write_lock(source / "kernels.lock", lock())
    packages = source / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"No kernels.lock is found"):
        find_lock(module(packages, "guest", ""))


def test_the_caller_is_found_by_frame() -> None:
    """The nearest code that is not of this library called, whatever stands in between."""
    assert find_caller().file == Path(__file__)
    assert next(map(lambda _: find_caller(), [0])).file == Path(__file__)
    ours = eval("lambda call: call()", {"__name__": "kernels_plugins.hub.x", "find_caller": find_caller})
    assert ours(find_caller).file == Path(__file__)
    similar = eval("lambda: find_caller()", {"__name__": "kernels_plugins_more", "find_caller": find_caller})
    assert similar() == Caller("kernels_plugins_more", None)


def test_no_lock_is_an_error_with_the_next_step() -> None:
    """At a prompt, and in a package without a lock, the message names the places searched and the next step."""
    with pytest.raises(ArgumentError) as caught:
        find_lock(Caller("__main__", None))
    assert str(caught.value) == (
        "No kernels.lock is found for '__main__': there is none in any package of that name. Run `kernels-core lock "
        "<project>`, build the project with setuptools and kernels-core among the `requires` of its [build-system], "
        "and install it again; or name the file with lockfile=."
    )
    with pytest.raises(ArgumentError, match=r"there is none in the metadata of torch \d"):
        find_lock(Caller("torch.nn", None))


# --- pyproject.toml ------------------------------------------------------------------------------


def test_dependencies_are_read(tmp_path: Path) -> None:
    """The table says repository and version; the order is kept."""
    (tmp_path / "pyproject.toml").write_text('[tool.kernels.dependencies]\n"b/silu" = 2\n"a/silu" = 0\n')
    assert read_dependencies(tmp_path) == (Dependency("b/silu", version=2), Dependency("a/silu", version=0))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "There is no .*pyproject.toml: name the folder of the project"),
        ("[tool", "Cannot read .*Correct the file"),
        ("", "names no kernels. Write"),
        ("tool = 1", "names no kernels. Write"),
        ("[tool.kernels]", "names no kernels. Write"),
        ("[tool.kernels]\ndependencies = 3", r"\[tool.kernels.dependencies\] is 3. Write"),
        ("[tool.kernels.dependencies]", r"\[tool.kernels.dependencies\] is {}. Write"),
        ("[tool.kernels.dependencies]\nsilu = 1", "'silu' is no kernel. Write"),
        ('[tool.kernels.dependencies]\n"a/b/c" = 1', "'a/b/c' is no kernel. Write"),
        ('[tool.kernels.dependencies]\n"a/b" = ">=1"', "the version of 'a/b' is '>=1', not a whole number"),
        ('[tool.kernels.dependencies]\n"a/b" = true', "the version of 'a/b' is True, not a whole number"),
        ('[tool.kernels.dependencies]\n"a/b" = -1', "the version of 'a/b' is -1, not a whole number"),
    ],
)
def test_dependencies_that_cannot_be_read(tmp_path: Path, text: str | None, problem: str) -> None:
    """A source without kernels is an error that says what to write."""
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ArgumentError, match=problem):
        read_dependencies(tmp_path)
