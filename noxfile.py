"""Every check of this repository, each in an environment of its own.

`nox` runs what continuous integration runs; `nox -l` lists the rest; `nox -s tests -- -k scope` passes
arguments on.
"""

import shutil
import sys
from pathlib import Path

import nox

TORCH = "torch==2.13.0"
"""The one PyTorch that everything runs on; unpinned, pip would fetch gigabytes of a newer one's CUDA libraries."""

TEST_TOOLS = (
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "numpy",
    "prometheus-client==0.26.0",
    "sigstore==4.5.1",
    "cyclonedx-python-lib[json-validation]==11.12.0",
)
KERNELS = "kernels==0.17.2"
"""The library whose users are to lose nothing here: the oracle of tests/parity."""

RUFF = "ruff==0.17.6"
MYPY = "mypy==2.4.1"

NEWEST_TORCH = "torch==2.15.0"
MINIMUM_TORCH = "torch==2.6.0"
MINIMUMS = (
    "filelock==3.12.*",
    "huggingface_hub==1.10.*",
    "importlib-metadata==6.0",
    "packaging==22.0",
    "pluggy==1.5.0",
    "rich==13.0",
    "typer==0.15.4",
)
"""The oldest dependencies that pyproject.toml allows."""

nox.options.sessions = ["tests", "lint", "types", "docs", "parity", "models"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *requirements: str) -> None:
    """Install PyTorch first, then this project in place, then the rest."""
    session.install(TORCH)
    session.install("-e", ".", *requirements)


def test_with(session: nox.Session, torch: str, *others: str) -> None:
    """Run the tests with another PyTorch, and other versions of the rest."""
    session.install(torch)
    session.install("-e", ".", *TEST_TOOLS)
    if others:
        session.install(*others)  # on top: the tools ask for newer ones, but run with these
    session.run("pytest", "-n", "3", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    install(session, *TEST_TOOLS)
    session.run("pytest", "-n", "3", *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """Run the same scenarios through Hugging Face's `kernels` and through this library."""
    install(session, *TEST_TOOLS, KERNELS)
    session.run("pytest", "-n", "2", "tests/parity", *session.posargs)


@nox.session
def models(session: nox.Session) -> None:
    """Adopt models of transformers, and compare them with untouched ones; start actors of Ray."""
    install(session, *TEST_TOOLS, "transformers", "peft", "accelerate", "ray")
    chosen = "adopt or quickstart or ten_lines or demo_serves or ray_actors"
    session.run("pytest", "-n", "2", "-k", chosen, "tests/plugins", "tests/docs", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and layout."""
    session.install(RUFF)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, in the packages and from a user's side."""
    shutil.rmtree("build", ignore_errors=True)  # setuptools would install modules from there that are no more
    session.install(TORCH)
    session.install(".", MYPY, *TEST_TOOLS)
    session.run("mypy")
    user = Path("tests/typing").absolute()
    session.chdir(session.create_tmp())  # away from the sources: what is checked is what was installed
    session.run("mypy", "--strict", "--config-file=", str(user))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, and run its examples."""
    install(session, *TEST_TOOLS, "-r", "docs/requirements.txt")
    session.run("mkdocs", "build", "--strict")
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run kernels from a Hub on this machine, and a model of transformers with the best for each shape."""
    install(session, "numpy", "transformers")
    session.run("python", "-m", "kernels_core", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks, against Hugging Face `kernels` where that does the same, and in models of transformers."""
    install(session, "numpy", "transformers", KERNELS)
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests on the oldest dependencies: gigabytes, for old versions of PyTorch come with those of CUDA."""
    test_with(session, MINIMUM_TORCH, *MINIMUMS)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the tests on the newest PyTorch: gigabytes, for it comes with those of CUDA."""
    test_with(session, NEWEST_TORCH)


@nox.session
def dist(session: nox.Session) -> None:
    """Build the distributions, install the wheel where nothing else is, and run the demo there."""
    session.install("build")
    folder = Path(session.create_tmp()).absolute()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"))  # the wheel from the sdist
    (wheel,) = (folder / "dist").glob("*.whl")
    session.run("python", "-m", "venv", "--clear", str(folder / "empty"))
    python = str(folder / "empty" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    session.chdir(folder)  # away from the sources
    session.run(python, "-m", "pip", "install", "--quiet", TORCH, external=True)
    session.run(python, "-m", "pip", "install", "--quiet", str(wheel), external=True)
    session.run(python, "-c", "import kernels_core, kernels_plugins; print(kernels_core.__file__)", external=True)
    session.run(python, "-m", "kernels_core", "demo", external=True)
