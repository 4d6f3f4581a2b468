"""Files that are replaced whole or not at all, and JSON that may be of another kind; for plugins, too."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArgumentError, require_type

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

_LARGEST = 64 << 20
"""Bytes of a file: the record of a layer or cell takes a few hundred."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other thread or process in such a block for the same folder, which is made where it is missing.

    The lock is one of the folder itself, and leaves no file behind; some network file systems have none.

    Args:
        folder: The folder.

    Raises:
        OSError: If it cannot be made or opened.

    Example:
        >>> import tempfile
        >>> with alone_in(Path(tempfile.mkdtemp())):
        ...     pass
    """
    require_type(folder, Path, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # there are no locks: as on Windows
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)  # that frees it, as the end of the process does


def write_file(path: Path, text: str) -> None:
    """Write a text file, and its folder where that is missing.

    Readers find the old content or the new one, also when two processes write at once, or one is killed.

    Args:
        path: The file.
        text: The content.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
        >>> write_file(path, "whole")
        >>> path.read_text(), [other.name for other in path.parent.iterdir()]
        ('whole', ['file.txt'])
    """
    require_type(path, Path, "path")
    require_type(text, str, "text")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename across file systems would be a copy, which readers could find half done.
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.new")
    try:
        with new.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut, a file of this name would be empty
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # there only if the writing failed


def read_json(path: str | os.PathLike[str], parse: Callable[[Any], T], what: str, remedy: str) -> T:
    """Read a file of JSON, and let a function parse that.

    Args:
        path: The file.
        parse: Makes a value of parsed JSON, or raises `ArgumentError`.
        what: What the file should be.
        remedy: What makes such a file.

    Raises:
        ArgumentError: If the file cannot be read, or is no such file; names the problem.

    Example:
        >>> read_json("missing.json", dict, "price list", "The shop makes one")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: '...missing.json' is no price list: No such file or directory. The shop makes one.
    """
    require_type(path, (str, os.PathLike), f"The path of a {what}")
    require_type(what, str, "what")
    require_type(remedy, str, "remedy")
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:  # a pipe would be read for ever
            raise ValueError(f"it is no regular file of at most {_LARGEST >> 20} MiB")
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        problem = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise ArgumentError(  # absolute: a relative path is read from the working directory, which may be another
            f"{os.path.abspath(os.fspath(path)).encode(errors='replace').decode()!r} is no {what}: {problem}. {remedy}."
        ) from error


def of_format(value: Any, key: str, version: int, make: Callable[[dict[str, Any]], T]) -> T:
    """Check the format that parsed JSON states, and make a value of it.

    Args:
        value: The JSON.
        key: Where it states its format.
        version: The format that is read.
        make: Makes a value of it; where that fails, the JSON is malformed.

    Raises:
        ArgumentError: If it is of another format, or malformed.

    Example:
        >>> of_format({"prices": 1, "milk": 2}, "prices", 1, lambda value: value["milk"])
        2
    """
    require_type(key, str, "key")
    require_type(version, int, "version")
    if not isinstance(value, dict) or value.get(key) != version:
        found = value.get(key) if isinstance(value, dict) else None
        raise ArgumentError(f"its format is {found!r:.100}, and this version of kernels-core reads {version}")
    try:
        return make(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"it is malformed: {type(error).__name__}: {error}") from error
