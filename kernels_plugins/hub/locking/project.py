"""Projects that depend on kernels: `[tool.kernels.dependencies]` in `pyproject.toml`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kernels_core import ArgumentError

from ..dependency import Dependency
from ..names import is_repo_id, is_version
from .lockfile import LOCK

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


PYPROJECT = "pyproject.toml"
_EXAMPLE = '[tool.kernels.dependencies]\n"owner/name" = 1'


def read_dependencies(folder: Path) -> tuple[Dependency, ...]:
    """Return the kernels that a project depends on, as its `pyproject.toml` lists them.

    Example:
        >>> read_dependencies(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: There is no /nowhere/pyproject.toml: name the folder of the project.
    """
    path = folder / PYPROJECT
    table = _table(path)
    if table is None:
        raise ArgumentError(f"{path} names no kernels. Write\n{_EXAMPLE}")
    if not isinstance(table, dict) or not table:
        raise ArgumentError(f"{path}: [tool.kernels.dependencies] is {table!r}. Write\n{_EXAMPLE}")
    for repo_id, version in table.items():
        if not is_repo_id(repo_id):
            raise ArgumentError(f"{path}: {repo_id!r} is no kernel. Write\n{_EXAMPLE}")
        if not is_version(version):
            raise ArgumentError(f"{path}: the version of {repo_id!r} is {version!r}, not a whole number such as 1.")
    return tuple(Dependency(repo_id, version=version) for repo_id, version in table.items())


def find_project(place: Path) -> Path | None:
    """Return the folder of the project that a file belongs to, if that project has a lock.

    It is the nearest one above the file with a `pyproject.toml`. A file that is installed into an environment does not
    belong to the project that the environment happens to lie in.
    """
    for folder in place.resolve().parents:
        if folder.name in ("site-packages", "dist-packages"):
            return None
        if (folder / PYPROJECT).is_file():
            return folder if (folder / LOCK).is_file() else None
    return None


def _table(path: Path) -> Any:
    try:
        data: Any = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise ArgumentError(f"There is no {path}: name the folder of the project.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"Cannot read {path}: {error}. Correct the file.") from error
    for name in ("tool", "kernels", "dependencies"):
        if not isinstance(data, dict) or name not in data:
            return None
        data = data[name]
    return data
