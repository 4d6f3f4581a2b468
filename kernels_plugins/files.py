"""Locks that are files; and the writing of files, which the core has for all plugins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from kernels_core import alone_in, write_file

__all__ = ["alone_in", "alone_with", "write_file"]


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
