"""Files that are replaced whole or not at all, and locks that are files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other thread or process in such a block for the same folder, which is made where it is missing.

    The lock is one of the folder itself, and leaves no file behind; some network file systems have none.

    Example:
        >>> import tempfile
        >>> with alone_in(Path(tempfile.mkdtemp())):
        ...     pass
    """
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


@contextlib.contextmanager
def alone_with(lock: Path, seconds: float) -> Iterator[None]:
    """Let no other thread or process in such a block for the same file; after some seconds, go on nevertheless.

    For work that is only wasted if two do it: also where the file cannot be made, or its file system has no locks.

    Example:
        >>> import tempfile
        >>> with alone_with(Path(tempfile.mkdtemp()) / "lock", 1.0):
        ...     pass
    """
    held = FileLock(lock, timeout=seconds)
    with contextlib.suppress(OSError, Timeout, NotImplementedError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()  # where it is held; the end of the process frees it, too


def write_file(path: Path, text: str) -> None:
    """Write a text file, and its folder where that is missing.

    Readers find the old content or the new one, also when two processes write at once, or one is killed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
        >>> write_file(path, "whole")
        >>> path.read_text(), [other.name for other in path.parent.iterdir()]
        ('whole', ['file.txt'])
    """
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
