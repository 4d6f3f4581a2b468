"""Selects the build variant that fits this machine, by the names of folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import AbsentError
from .machine import this_machine
from .metadata import METADATA
from .variants import VariantChoice, choose_for_cpu, choose_variants


def choose_here(names: Iterable[str], backend: str | None = None, on_cpu: bool = False) -> VariantChoice:
    """Split the folders of a kernel into those that fit this machine and the rest."""
    if on_cpu and backend is None:
        return choose_for_cpu(names, this_machine())
    return choose_variants(names, this_machine(backend))


def select_variant(names: Iterable[str], backend: str | None = None, on_cpu: bool = False) -> str:
    """Return the name of the build that fits this machine best; arguments as for `choose_here`."""
    choice = choose_here(names, backend, on_cpu)
    if choice.accepted:
        return str(choice.accepted[0])
    why = "\n".join(f"    {name}: {reason}" for name, reason in choice.rejected) or "    `build` is empty"
    raise AbsentError(
        f"no build variant fits this machine:\n{why}\n  Ask the publisher for a build, or try another one"
    )


def local_variant(path: Path, backend: str | None = None, on_cpu: bool = False) -> Path:
    """Return the folder of the build that fits best: of a repository, of a folder with builds, or of a build."""
    if not path.is_dir():
        raise AbsentError("there is no such folder: check the path")
    if (path / METADATA).is_file():  # the folder is a build itself
        return path
    builds = {folder.name: folder for folder in local_builds(path)}
    return builds[select_variant(builds, backend, on_cpu)]


def local_builds(path: Path) -> list[Path]:
    """Return the folders of the builds of a repository on disk, or in a folder with builds."""
    base = path / "build" if (path / "build").is_dir() else path
    return sorted(folder for folder in base.iterdir() if folder.is_dir())
