"""`Scope`: a block in which dispatch may decide otherwise."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from torch import multiprocessing

from ..errors import ScopeError
from ..warning import warn_once
from .frame import (
    Frame,
    activate,
    active_frame,
    forget_unscoped,
    here,
    open_scopes,
    reset_frame,
    root,
    set_frame,
    unscoped,
)
from .kept import keep_scopes, note_checkpoint

_borrowed: ContextVar[Frame | None] = ContextVar("kernels_core_borrowed", default=None)
"""In a thread of autograd, the frame of its caller in which a scope was entered."""


class Scope:
    """A context manager in which dispatch may decide otherwise.

    Plugins find its payload in `LayerRequest.scopes`, innermost scope first. Scopes nest, are active only in
    the thread or asyncio task that entered them and in the backwards that it runs, and can be entered any number of
    times, also by several threads at once: decisions made inside are kept as long as the object lives.

    Args:
        payload: Anything a plugin wants to find in `LayerRequest.scopes`; must not refer to the
            scope itself.

    Example:
        >>> with Scope({"profile": "fast"}):
        ...     resolve("RMSNorm", device="cpu", mode=Mode.INFERENCE).request.scopes
        ({'profile': 'fast'},)
    """

    def __init__(self, payload: object) -> None:
        """Carry `payload`."""
        self._payload = payload

    def __enter__(self) -> Scope:
        """Make this the innermost scope of the current thread or task."""
        keep_scopes()  # before: the forward of a custom function was entered in the scopes around this one
        parent = active_frame()
        if parent is unscoped:
            forget_unscoped()
            parent = here(notice=False)  # who enters a scope knows of them
            if active_frame() is unscoped:  # in a thread of autograd, which goes on for other threads
                _borrowed.set(parent)
        if parent is root:
            note_checkpoint()  # which enters the scope again when it recomputes
        # No token to reset: one object may be entered many times, and by several threads at once.
        self._move(parent.children.get(id(self)) or parent.of_scope(self, self._payload), 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back to the scope around this one."""
        frame = active_frame()
        if frame.orphaned and frame.scope is not None and frame.scope() is self:
            # The one around it went first, as with a generator that is closed: the thread would stay in it for ever.
            count = 0
            while frame.orphaned and frame.parent is not None:
                frame, count = frame.parent, count - 1
            self._move(frame, count)
        # By the id: a scope has a frame in each one that it was entered in, and no list of these.
        if frame.key != id(self) or frame.orphaned or frame.parent is None:
            raise ScopeError(
                "This scope is not the innermost one of this thread or task: leave scopes in the "
                "reverse order of entering them, in the thread or task that entered them."
            )
        self._move(frame.parent, -1)
        if _borrowed.get() is frame.parent:
            _borrowed.set(None)
            reset_frame(unscoped, frame.parent)

    def _move(self, frame: Frame, change: int) -> None:
        """Make a frame the active one, and count the scopes that are open in this thread."""
        set_frame(frame)
        thread = threading.get_ident()
        open_scopes[thread] = open_scopes.get(thread, 0) + change
        if not open_scopes[thread]:
            del open_scopes[thread]  # to be in the dict means to be in a scope; and threads end


class ForwardScope(Scope):
    """A scope of our own around forwards, in each call of some models: a thread that is in none is not reported."""

    def _move(self, frame: Frame, change: int) -> None:
        activate(frame)


def _reduced(process: Any) -> Any:
    """Pickle a process that is started afresh, and not as a copy of this one."""
    if here() is not root:
        warn_once(
            "A process is started in a scope, and takes nothing of this process: its mapping does not serve there. "
            "Enter the scope in the function that the process runs, or register the mapping there."
        )
    return process.__reduce_ex__(2)


_processes: Any = multiprocessing  # its classes of processes differ by system
for _context in (_processes, *map(_processes.get_context, multiprocessing.get_all_start_methods())):
    _processes.reducer.register(_context.Process, _reduced)
