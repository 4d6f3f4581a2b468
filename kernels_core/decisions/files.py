"""Files that are replaced whole or not at all; for plugins, too."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..errors import require_type

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


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
