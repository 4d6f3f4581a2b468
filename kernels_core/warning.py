"""Warnings that are issued once: in the process, or for an object that remembers its own."""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from collections.abc import Hashable
from types import NoneType

from .errors import KernelsWarning, require_type

_lock = threading.Lock()

_LIBRARIES = {"kernels_core", "kernels_plugins", "pluggy", "torch", "contextlib", "copy", "importlib"}
"""Packages between a line of the user and a warning; the last ones call functions of ours for functions of ours."""


def warn(message: str, stacklevel: int = 1) -> None:
    """Issue a `KernelsWarning` that points to the line of the user: filters and reports show that line."""
    frame, level, line = sys._getframe(1), 2, 0
    while True:
        # A generated forward has no name of a module, and Dynamo runs compiled code under the name of the user's.
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES and "__name__" in frame.f_globals:
            stacklevel -= 1
            line = level
        if stacklevel <= 0 or frame.f_back is None:  # at a prompt, or in a thread of ours, no line is the user's
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, KernelsWarning, stacklevel=line or level)


class WarnOnce:
    """Issue each `KernelsWarning` once; also from several threads at the same time.

    `warn_once` is the one that the whole process shares. An object whose warnings are its own, such as a plugin
    manager, makes another and keeps it.

    Example:
        >>> warn = WarnOnce()
        >>> with warnings.catch_warnings(record=True):
        ...     warnings.simplefilter("always")
        ...     warn("The kernel is slow."), warn("The kernel is slow.")
        (True, False)
    """

    def __init__(self) -> None:
        """Start with no warning issued."""
        self._issued: set[Hashable] = set()

    def __call__(
        self,
        message: str,
        key: Hashable | None = None,
        *,
        stacklevel: int = 1,
        logger: logging.Logger | None = None,
    ) -> bool:
        """Warn, unless a warning with that key was issued before.

        Where warnings are errors, each attempt raises: a warning that raised was not issued.

        Args:
            message: The text of the warning.
            key: Identifies the warning; by default the message, without the addresses of objects in it.
            stacklevel: Where the warning points to: 1 for the innermost line outside of kernels-core, its plugins,
                pluggy and PyTorch, which is that of the user; 2 for the next one outside of them.
            logger: Log the message at level `WARNING` there instead.

        Returns:
            Whether it was issued now.

        Raises:
            KernelsWarning: If a filter of the module `warnings` turns it into an error.
        """
        require_type(message, str, "A warning")
        require_type(key, Hashable, "The key of a warning")
        require_type(stacklevel, int, "stacklevel")
        require_type(logger, (logging.Logger, NoneType), "logger")
        if key is None:
            key = re.sub(r" at 0x[0-9a-fA-F]+", "", message)  # two objects of a kind are not two things to report
        with _lock:
            if key in self._issued:
                return False
            self._issued.add(key)
        try:  # without the lock: code of the user may show warnings, and call layers
            if logger is not None:
                logger.warning(message)
            else:
                warn(message, stacklevel)
        except BaseException:
            self.forget(key)
            raise
        return True

    def forget(self, key: Hashable | None = None) -> None:
        """Issue warnings again that were issued before.

        Args:
            key: Of the one to issue again; None for all.
        """
        with _lock:
            if key is None:
                self._issued.clear()
            else:
                self._issued.discard(key)


warn_once = WarnOnce()
"""Issues each warning once per process."""
