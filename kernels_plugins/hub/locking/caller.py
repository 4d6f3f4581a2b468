"""Finds the calling module, and the lock of the package that it belongs to."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import importlib_metadata

from kernels_core import ArgumentError

from .lockfile import HASHES, LOCK, Lock, parse_lock, read_lock
from .project import find_project

_OURS = ("kernels_core", "kernels_plugins")


@dataclass(frozen=True)
class Caller:
    """Code that called into this library."""

    module: str  # name of its module, also where that is run as a program
    file: Path | None  # its source file; None where there is none, as at a prompt

    def __str__(self) -> str:
        return f"{self.module!r} ({self.file})" if self.file else repr(self.module)


def find_caller() -> Caller:
    """Return the calling code: the nearest frame outside of this library.

    Example:
        >>> find_caller().module
        'doctest'
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package(_module(frame)) in _OURS and frame.f_back is not None:
        frame = frame.f_back
    assert frame is not None
    file = Path(frame.f_code.co_filename)
    return Caller(_module(frame), file if file.is_file() else None)


def find_lock(caller: Caller) -> Lock:
    """Return the lock of the package that the calling code belongs to.

    A checkout, and a package that is installed in place, has it beside its `pyproject.toml`; any other
    package has it in its metadata, where setuptools put it when the package was built.
    """
    looked = []
    distributions = _distributions(caller)
    owner = next((distribution for distribution in distributions if _owns(distribution, caller.file)), None)
    if owner is None and caller.file is not None:
        if project := find_project(caller.file):
            return read_lock(project / LOCK)
        looked.append(f"beside a pyproject.toml above {caller.file}")
    for distribution in distributions if owner is None else [owner]:
        name = f"{distribution.metadata['Name']} {distribution.version}"
        if (folder := _editable(distribution)) is not None and (folder / LOCK).is_file():
            return read_lock(folder / LOCK)
        text = distribution.read_text(LOCK)
        if text is not None:
            return parse_lock(text, distribution.read_text(HASHES), origin=f"{LOCK} in the metadata of {name}")
        looked.append(f"in the metadata of {name}")
    raise ArgumentError(
        f"No {LOCK} is found for {caller}: there is none {' and none '.join(looked) or 'in any package of that name'}. "
        "Run `kernels-core lock <project>`, build the project with setuptools and kernels-core among the `requires` of "
        "its [build-system], and install it again; or name the file with lockfile=."
    )


def _module(frame: FrameType) -> str:
    """Return the name of the module of a frame, also of one that is run with `python -m`."""
    spec = frame.f_globals.get("__spec__")  # first: `__name__` is "__main__" for `python -m`
    return str(getattr(spec, "name", None) or frame.f_globals.get("__name__") or "")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _distributions(caller: Caller) -> list[importlib_metadata.Distribution]:
    """Return the distributions that may contain a module: several may share a namespace."""
    # By what is installed: a distribution may have another name.
    names = importlib_metadata.packages_distributions().get(_package(caller.module), ())
    return [cast(Any, importlib_metadata.distribution(name)) for name in dict.fromkeys(names)]


def _owns(distribution: importlib_metadata.Distribution, file: Path | None) -> bool:
    """Whether a file was installed by a distribution; that of one that is installed in place was not."""
    if file is None:
        return False
    path = file.resolve()
    # Most files have another name: the rest of the comparison asks the disk.
    return any(own.name == path.name and Path(str(own.locate())).resolve() == path for own in distribution.files or ())


def _editable(distribution: importlib_metadata.Distribution) -> Path | None:
    """Return the folder of a project that is installed in place."""
    try:
        data = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None  # malformed: the metadata of the distribution is read then
    if not isinstance(data, dict) or not (data.get("dir_info") or {}).get("editable"):
        return None
    url = urlsplit(str(data.get("url", "")))
    return Path(url2pathname(url.path)) if url.scheme == "file" else None
