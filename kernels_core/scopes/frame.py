"""Frames, which keep the decisions made in each scope; the dispatcher reads them.

The innermost frame of this thread or task is a context variable. Threads start without one: see `here`.
"""

from __future__ import annotations

import asyncio
import copyreg
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

from ..layer import Forward
from ..torch_internals import carried, carry, graph_task
from ..warning import warn_once

PATIENCE = 60.0
"""Seconds to wait for another thread that resolves or loads the same.

Such a thread may itself wait for an import that this thread is in the middle of, which looks
the same as a long download from here: after this time, calls continue without it."""


class ForkLock:
    """A reentrant lock, `lock`, that is free in a forked child.

    The thread that held it while another one forked does not exist in the child, which would wait for it in vain.
    Release the lock that you acquired: in a child that is forked in between, `lock` is another one.
    """

    def __init__(self) -> None:
        self.free()
        _fork_locks.add(self)

    def free(self) -> None:
        """Replace the lock by a free one."""
        self.lock = threading.RLock()


_fork_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _free_locks() -> None:
    for one in list(_fork_locks):
        one.free()
    for other in open_scopes.keys() - {threading.get_ident()}:
        del open_scopes[other]  # of a thread that does not exist in the child, whose number a new thread may get


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_free_locks)

resolving: ContextVar[bool] = ContextVar("kernels_core_resolving", default=False)
"""Whether this thread or task is resolving a layer: decorated layers then run on their reference."""


class Frame:
    """One scope, entered under another: a node of the tree whose root is the whole process.

    Forwards that were decided here are kept in two places, because two kinds of calls read them:

    - Eager calls read an attribute of the frame, one per decorated layer and device (`publish`).
      Without `__slots__`, and without defaults on the class, that is the quickest read there is.
    - Traced calls read a property of the class that is backed by a `FrameTable`.
    """

    active: Any
    """The innermost frame of this thread or task: `root.active`. Set below."""
    in_function: Any
    """The answer of `in_function` for traced calls, with `keep_scopes`. Set in `kept`, as is the next one."""
    keeps_scopes: Any
    """The same in scopes, and false outside of them, where there are none to keep."""

    def __init__(self, payload: object = None, parent: Frame | None = None, key: int = 0) -> None:
        self.payload = payload
        self.parent = parent
        self.key = key
        self.children: dict[int, Frame] = {}  # by the id of their scope, whose finalizer removes them
        self.finalizer: weakref.finalize[[weakref.ref[Frame]], Any] | None = None  # of the scope
        self.published: set[str] = set()
        self.tables: set[FrameTable] = set()
        self.orphaned = False
        self.scope: weakref.ref[object] | None = None  # once it is orphaned, for the scope around it has gone first

    def __reduce__(self) -> str:
        """Pickle the root by its name, for pickles by value of decorated functions; no other frame."""
        if self is not root:
            raise TypeError("cannot pickle an open scope: the process that loads it opens its own")
        return "root"

    def of_scope(self, scope: object, payload: object) -> Frame:
        """Return the frame of a scope that is entered in this one, kept in `children`; it lives as long as that."""
        forget_unscoped()
        with _lock:  # several threads may enter this scope for the first time
            if (frame := self.children.get(id(scope))) is None:
                frame = self.children[id(scope)] = Frame(payload, self, id(scope))
                _frames.add(frame)
                frame.finalizer = weakref.finalize(scope, _drop, weakref.ref(frame))
                frame.finalizer.atexit = False
        return frame

    def payloads(self) -> tuple[object, ...]:
        """Return the payloads of the open scopes, innermost first."""
        here, found = self, []
        while here.parent is not None:
            found.append(here.payload)
            here = here.parent
        return tuple(found)


root = Frame()
"""The frame around all scopes."""

unscoped = Frame()
"""The active frame of threads that have entered no scope: `here` finds the one whose decisions serve them.

Until a scope is entered anywhere in the process, that is the root, whose decisions are published here, too. After that,
nothing is: so each of these threads comes to `here` once, at its next call, though all layers may be warm.
"""

_current: ContextVar[Frame] = ContextVar("kernels_core_frame", default=unscoped)


class _Nowhere:
    """The frames of a copied forward, whose code has names of the process that it comes from: nothing is found."""

    get = object


def _copied(variable: ContextVar[Any]) -> Any:
    """Pickle the variable, for pickles by value of decorated functions; no other one."""
    if variable is not _current:
        raise TypeError("cannot pickle 'ContextVar' object")
    return _Nowhere, ()


copyreg.pickle(ContextVar, _copied)

activate = _current.set
"""Makes a frame the active one, without telling autograd: see `set_frame`."""

active_frame = _current.get
"""Returns `root.active`, a little quicker, where Dynamo does not look; often `here` is meant."""

# The getter is implemented in C, so Dynamo evaluates and guards this attribute instead of tracing
# into it. (Called with an argument, `ContextVar.get` takes it as the default: here that is the root.)
Frame.active = property(_current.get)

_lock = threading.RLock()
listeners: list[Callable[[], None]] = []
"""Called when every decision was dropped."""

_tables: weakref.WeakSet[FrameTable] = weakref.WeakSet()
_frames: weakref.WeakSet[Frame] = weakref.WeakSet([root, unscoped])
_generation = 0


# --- The frame of a thread ---------------------------------------------------------------------------

CARRIED = "kernels_core_frame"
"""The key of the frame among what autograd carries from the thread that starts a backward to its own threads."""

_any_scope = False  # whether one was ever entered
open_scopes: dict[int, int] = {}
"""How many scopes are open in each thread, by its number."""


def here(*, notice: bool = True) -> Frame:
    """Return the frame whose decisions serve this thread or task; notice if others are in scopes and it is not."""
    frame = active_frame()
    return frame if frame is not unscoped else _find_frame(notice)


def _find_frame(notice: bool) -> Frame:
    if not _any_scope:
        return root
    if graph_task() == -1:
        _current.set(root)
        if notice:
            _notice_scopes_elsewhere()
        return root
    # Autograd has threads of its own for each GPU, which run the backwards of all threads in turn: nothing may be set.
    # From PyTorch 2.13 on, it carries the context of the caller, or of its own thread where a backward starts another.
    context = carried("context")
    frame: Frame | None = context.get(_current) if isinstance(context, Context) else None
    if frame is None or frame is unscoped:
        frame = carried(CARRIED)
    if frame is None and notice:
        _notice_scopes_elsewhere()
    return frame or root


def _notice_scopes_elsewhere() -> None:
    me = threading.current_thread()
    others = [thread for thread in threading.enumerate() if thread is not me and thread.ident in open_scopes]
    if others:
        warn_once(
            f"A layer is called in thread {me.name!r}, which is in no scope, while thread "
            f"{others[0].name!r} is in one: its mapping does not serve here. If it should, call the function of this "
            "thread as contextvars.copy_context().run(function), with a copy that is made in the scope, or register "
            "the mapping for the process.",
            key=CARRIED,
        )


def reset_frame(frame: Frame, frame_carried: Frame | None) -> None:
    """Go back to the active frame that was before, and to the one that autograd carries."""
    _current.set(frame)
    # Of a task, the thread does not tell which one starts a backward; from PyTorch 2.13 on, its context does.
    if frame_carried is root or asyncio._get_running_loop() is not None:
        frame_carried = None
    carry(CARRIED, frame_carried)


def set_frame(frame: Frame) -> None:
    """Make a frame the active one of this thread or task, also where autograd runs its backward."""
    _current.set(frame)
    carry(CARRIED, frame if frame is not root and asyncio._get_running_loop() is None else None)


def forget_unscoped() -> None:
    """Publish nothing in `unscoped` any more: a scope is entered."""
    global _any_scope
    if _any_scope:
        return
    with _lock:
        _any_scope = True
        _unpublish(unscoped, set(unscoped.published))
        for table in list(unscoped.tables):
            table.pop(unscoped, None)
        unscoped.tables.clear()


def _kept_in(frame: Frame) -> tuple[Frame, ...]:
    return (frame, unscoped) if frame is root and not _any_scope else (frame,)


def _drop(reference: weakref.ref[Frame]) -> None:
    """Take a frame whose scope is gone out of the tables: they hold frames strongly."""
    if (frame := reference()) is None:
        return
    with _lock:
        frame.orphaned = True  # a task may still be in it
        if frame.parent is not None:
            frame.parent.children.pop(frame.key, None)
        if frame.finalizer is not None and (living := frame.finalizer.detach()) is not None:
            frame.scope = weakref.ref(living[0])
        for child in list(frame.children.values()):
            _drop(weakref.ref(child))
        for table in list(frame.tables):
            table.pop(frame, None)


class FrameTable(dict[Frame, Forward]):
    """The forwards that serve traced calls of one layer on one device, by frame; decides where there is none yet.

    It is read as a property of the class `Frame` whose getter is this table's `__getitem__`. Dynamo
    evaluates such a property at trace time and in guards instead of tracing into it. So a cold layer
    is resolved outside of the graph; and after a change of mappings the guards themselves see the
    new value, so that code whose answer did not change is not compiled again.
    """

    def __init__(self, name: str, reference: Forward, resolve: Callable[[Frame], Forward]) -> None:
        """Publish as `Frame.<name>`."""
        super().__init__()
        self.name = name
        self._reference = reference
        self._resolve = resolve
        self._busy = ForkLock()
        with _lock:
            _tables.add(self)
            setattr(Frame, name, property(self.__getitem__))

    __hash__ = object.__hash__  # type: ignore[assignment]  # a table is like no other

    def __eq__(self, other: object) -> bool:
        return self is other

    def __missing__(self, frame: Frame) -> Forward:
        if resolving.get():  # a plugin calls a decorated layer: no recursion, and no lock to wait for
            return self._reference
        if frame is unscoped:
            return self[here()]
        lock = self._busy.lock
        if not lock.acquire(timeout=PATIENCE):
            return self._reference
        try:
            if (known := self.get(frame)) is not None:
                return known
            before = _generation
            forward = self._resolve(frame)  # without `_lock`: it may take minutes, and other layers go on meanwhile
            with _lock:
                if before == _generation and not frame.orphaned:  # else this call gets it, and the next one decides
                    for one in _kept_in(frame):
                        self[one] = forward
                        one.tables.add(self)
            return forward
        finally:
            lock.release()


def generation() -> int:
    """Return a number that grows with every change of mappings and plugins."""
    return _generation


def publish(frame: Frame, name: str, answer: object, before: int) -> None:
    """Let warm eager calls find an answer, unless a mapping or plugin changed since generation `before`."""
    with _lock:
        if before == _generation:
            for one in _kept_in(frame):
                setattr(one, name, answer)
                one.published.add(name)
    if (active := active_frame()) is unscoped and not _any_scope:
        # CPython caches the value of a variable that is set, but looks its default up at each read.
        _current.set(active)


def forget() -> None:
    """Drop every decision: a mapping or a plugin changed."""
    global _generation
    with _lock:
        _generation += 1  # an answer that another thread decides now is not published any more
        for table in list(_tables):  # a list: dropping a forward may drop its layer, and with that its table
            table.clear()
        for frame in list(_frames):
            frame.tables.clear()
            _unpublish(frame, set(frame.published))
    # Without the lock: a listener may take other locks, whose holders may wait for this one.
    for listener in listeners:
        listener()


def _unpublish(frame: Frame, names: set[str]) -> None:
    for name in frame.published & names:
        if name in frame.published:  # an answer that is dropped here may drop a layer, which withdraws its names
            frame.published.discard(name)
            delattr(frame, name)


def withdraw(names: set[str]) -> None:
    """Take back names from all frames, published ones and tables, of a layer that cannot be called any more."""
    with _lock:
        for frame in list(_frames):
            _unpublish(frame, names)
        for name in list(names):
            if isinstance(vars(Frame).get(name), property):
                delattr(Frame, name)
