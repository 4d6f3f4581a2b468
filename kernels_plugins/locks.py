"""Locks by key, which are free in a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class KeyedLocks:
    """A reentrant lock for each key: threads that hold different keys do not wait for each other.

    Example:
        >>> locks = KeyedLocks()
        >>> with locks.hold("a"), locks.hold("b"), locks.hold("a"):
        ...     pass
    """

    def __init__(self) -> None:
        """Start with all locks free, and free them in each child: the threads that held them do not exist there."""
        self._free()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._free)

    def _free(self) -> None:
        self._guard = threading.Lock()
        # Reentrant: a kernel may load another one while it is imported.
        self._locks: dict[Hashable, threading.RLock] = {}

    @contextmanager
    def hold(self, key: Hashable = None) -> Iterator[None]:
        """Hold the lock of a key."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.RLock())
        with lock:  # outside of the guard: threads that want other keys go on
            yield
