"""The configuration file: which one applies, and who may have written it."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..warning import warn_once
from .lines import find_fault
from .section import ConfigSection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "KERNELS_CONFIG"
_OFF, _ON = ("", "0", "false", "no", "off"), ("1", "true", "yes", "on")
_TABLE = ("tool", "kernels-core")
_NAMES = {"kernels.toml": (), "pyproject.toml": _TABLE}
"""In one folder, the first of these that has settings applies."""

_MENTIONED = re.compile(rb"""tool["']?\s*\.\s*["']?kernels-core|^\s*["']?kernels-core["']?\s*[=.]""", re.MULTILINE)
"""Found in a `pyproject.toml` with settings: one of another project is neither parsed, nor to be complained about."""


def find_settings() -> ConfigSection | None:
    """Return the settings that apply to a process in this working directory; None if there are none.

    Raises:
        ConfigurationError: If the file cannot be read or is no TOML, or `KERNELS_CONFIG` names none.
    """
    named = os.environ.get(VARIABLE, "1").strip()
    if named.lower() in _OFF:
        return None
    if named.lower() not in _ON:
        return _named(Path(os.path.expanduser(named)))
    try:
        here = Path.cwd()
    except OSError:  # it was deleted
        return None
    for folder in (here, *here.parents):
        for name, table in _NAMES.items():
            path = folder / name
            # The only question to the system where there is none. What a folder that is closed to this user has, is not
            # for this user.
            if os.path.lexists(path) and (found := _found(path, table)) is not None:
                return found
    return None


def _named(path: Path) -> ConfigSection:
    problem = "there is no such file"
    try:
        path = Path(os.path.abspath(path))
        read = _read(path)
    except (OSError, ValueError) as error:
        read, problem = None, str(error)
    table = _TABLE if path.name == "pyproject.toml" else ()
    settings = _parsed(path, read[0], table) if read is not None else None
    if settings is None:
        why = f"it has no [{'.'.join(table)}]" if read is not None else problem
        raise ConfigurationError(f"{VARIABLE} names {path}: {why}. Correct or unset it.", file=str(path), line=0)
    return settings


def _found(path: Path, table: tuple[str, ...]) -> ConfigSection | None:
    """Return the settings of a file, None if it has none, or another user may have written it."""
    try:
        if (read := _read(path)) is None:
            return None
        data, owner = read
        if table and not _MENTIONED.search(data):
            return None
    except OSError as error:
        try:
            owner = os.stat(path)
        except OSError:  # a link to nothing, or a file that was deleted meanwhile
            return None
        if not _doubt(path, owner):
            raise ConfigurationError(f"{path} cannot be read: {error}.", file=str(path), line=0) from error
    if doubt := _doubt(path, owner):
        # A file decides which code runs: one that another user put above the working directory must not.
        warn_once(f"{path} is not used: {doubt}. If you trust it, name it with {VARIABLE}, or make it yours.")
        return None
    return _parsed(path, data, table)


def _read(path: Path) -> tuple[bytes, os.stat_result] | None:
    """Return content and owner of a file; None if there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else a pipe of that name would block
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    owner = os.fstat(handle)
    if not stat.S_ISREG(owner.st_mode):
        os.close(handle)
        return None
    with open(handle, "rb") as file:
        return file.read(), owner


def _doubt(path: Path, owner: os.stat_result) -> str:
    """Return why a file, or the link to it, may be written by another user than this one and root; else nothing."""
    if not hasattr(os, "geteuid"):  # Windows: the folders of users are closed to others
        return ""
    try:
        link = os.lstat(path)
    except OSError as error:
        return f"it was there, and is not: {error}"
    if foreign := {link.st_uid, owner.st_uid} - {0, os.geteuid()}:
        return f"it belongs to another user ({foreign.pop()})"
    return "every user may write it" if owner.st_mode & stat.S_IWOTH else ""


def _parsed(path: Path, data: bytes, table: tuple[str, ...]) -> ConfigSection | None:
    try:
        text = data.decode()
        found: Any = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
        else:
            place = re.search(r"at line (\d+)", str(error))  # else "at end of document", or no place
            line = int(place[1]) if place else find_fault(text)
        problem = f"{path}:{line}: this is no TOML: {error}. Correct the file."
        raise ConfigurationError(problem, file=str(path), line=line) from error
    for key in table:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return ConfigSection(path, (), found, text, table)
