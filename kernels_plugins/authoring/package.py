"""The package of a new plugin: its names, and its files from the folder `template`."""

from __future__ import annotations

import contextlib
import importlib.util
import keyword
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import importlib_metadata

from kernels_core import ArgumentError, __version__

_TEMPLATE = Path(__file__).with_name("template")
_SUFFIX = ".template"  # so that no tool takes a template for a file of this project
_NAME = re.compile(r"[A-Z0-9]([A-Z0-9._-]*[A-Z0-9])?", re.IGNORECASE | re.ASCII)
"""The name of a distribution: https://packaging.python.org/en/latest/specifications/name-normalization/."""


@dataclass(frozen=True)
class Names:
    """The names in a new package.

    Raises:
        ArgumentError: If a name cannot be used, or hides a module or a plugin that is installed.

    Example:
        >>> Names("Acme-Kernels", "RMSNorm").module
        'acme_kernels'
    """

    name: str  # of the distribution
    layer: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ArgumentError(
                f"{self.name!r} is no name of a package: write letters, digits, '-', '_' and '.', with a letter or "
                "digit at both ends, such as acme-kernels."
            )
        if reason := _no_identifier(self.module):
            raise ArgumentError(f"The module of {self.name!r} would be {self.module!r}, {reason}: choose another name.")
        if reason := _no_identifier(self.layer):
            raise ArgumentError(f"--layer is {self.layer!r}, {reason}: name it as a class, such as RMSNorm.")
        if taken := _taken(self):
            raise ArgumentError(f"{self.name!r} cannot be used: {taken}. Choose another name.")

    @property
    def plugin(self) -> str:
        """The name of the plugin, which is that of the distribution as indexes normalize it."""
        return re.sub(r"[-_.]+", "-", self.name).lower()

    @property
    def module(self) -> str:
        """The name of the module."""
        return self.plugin.replace("-", "_")


def _no_identifier(text: str) -> str:
    """Return why a text cannot name a module or a class; empty if it can."""
    if not text.isidentifier() or not text.isascii():
        return "which is no identifier of Python"
    return "a keyword of Python" if keyword.iskeyword(text) else ""


def _taken(names: Names) -> str:
    """Return what a new package would hide; empty if it hides nothing."""
    if names.module in sys.stdlib_module_names:
        return f"the module {names.module!r} belongs to the standard library"
    if names.module == "tests":
        return "its tests have the folder of that name"
    with contextlib.suppress(importlib_metadata.PackageNotFoundError):
        return f"{names.name} {importlib_metadata.version(names.name)} is installed, and would be replaced"
    spec = importlib.util.find_spec(names.module)
    if spec is not None and spec.origin is not None:  # a folder without code hides nothing
        return f"there is a module {names.module!r} already, {spec.origin}"
    for entry in importlib_metadata.entry_points(group="kernels_core"):
        if entry.name == names.plugin:
            return f"the plugin {names.plugin!r} of {entry.dist.name if entry.dist else entry.value} has that name"
    return ""


def render(names: Names) -> Mapping[str, str]:
    """Return the files of a package: text by path."""
    values = {
        "NAME": names.name,
        "PLUGIN": names.plugin,
        "MODULE": names.module,
        "LAYER": names.layer,
        "VERSION": __version__,
        "YEAR": str(date.today().year),
    }
    files = {}
    for path in sorted(_TEMPLATE.rglob(f"*{_SUFFIX}")):
        place = path.relative_to(_TEMPLATE).as_posix().removesuffix(_SUFFIX)
        place = re.sub(r"(^|/)dot-", r"\1.", place)  # tools leave out files whose names begin with a dot
        place = re.sub(r"^module/", f"{names.module}/", place)
        files[place] = re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], path.read_text(encoding="utf-8"))
    return files


def write(files: Mapping[str, str], folder: Path) -> None:
    """Write files into a folder that does not exist or is empty: all, or none.

    Raises:
        ArgumentError: If there is something in it, or it cannot be written.
    """
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(f"{folder} is not empty: name a new folder with --directory, or move it away.")
        for place, text in files.items():
            path = new / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        if folder.exists():
            folder.rmdir()
        os.rename(new, folder)
    except OSError as error:
        raise ArgumentError(f"Cannot write {folder}: {error}. Name another folder with --directory.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)  # there only if something failed
