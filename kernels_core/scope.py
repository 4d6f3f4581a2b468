"""What is active here: scopes, and what was resolved in each of them.

A `Scope` is a context manager that plugins make. Entering it under another scope makes a `Frame`,
which is what the dispatcher reads. The innermost frame of this thread or task is a context
variable, read through a property whose getter is implemented in C: Dynamo evaluates and guards such
an attribute instead of tracing into it, so compiled code follows the scope.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from .errors import ScopeError

_current: ContextVar[Frame] = ContextVar("kernels_core_frame")

resolving: ContextVar[bool] = ContextVar("kernels_core_resolving", default=False)
"""Whether this thread or task is resolving a layer: decorated layers then run on their reference."""

Forward = Callable[..., Any]


class Frame:
    """One scope, entered under another: a node of the tree whose root is the whole process.

    Its instance dictionary also holds what was resolved here for eager calls, an attribute per
    decorated layer and device (no `__slots__`, no default on the class: that is the quickest read).
    What cold traces read are properties of the class, one per layer and device, each backed by a
    `Table`.
    """

    one_accelerator = False  # whether the index of an accelerator is always 0; known once it is in use

    # Called with the frame, `ContextVar.get` takes it as the default: `root.active` is `root` where
    # no scope is open.
    active = property(_current.get)

    def __init__(self, payload: object, parent: Frame | None) -> None:
        self.payload = payload
        self.parent = parent
        self.orphaned = False
        self.children: weakref.WeakKeyDictionary[Scope, Frame] = weakref.WeakKeyDictionary()
        self.finalizer: weakref.finalize[[weakref.ref[Frame]], Scope] | None = None

    def payloads(self) -> tuple[object, ...]:
        """Return what the open scopes carry, innermost first."""
        here, found = self, []
        while here.parent is not None:
            found.append(here.payload)
            here = here.parent
        return tuple(found)


root = Frame(None, None)

_lock = threading.RLock()
_tables: list[Table] = []
_frames: weakref.WeakSet[Frame] = weakref.WeakSet([root])
_generation = 0


class Scope:
    """A context manager in which dispatch may decide otherwise.

    What it carries is shown to plugins as `LayerRequest.scopes`, innermost scope first. Scopes
    nest, are seen by the thread or asyncio task that entered them alone, and can be entered any
    number of times, also by several threads at once: what was resolved inside is kept as long as
    the object lives.

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
        parent: Frame = root.active
        frame = parent.children.get(self)
        _current.set(self._frame(parent) if frame is None else frame)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back to the scope around this one."""
        frame: Frame = root.active
        if frame.parent is None or frame.parent.children.get(self) is not frame:
            raise ScopeError(
                "This scope is not the innermost one of this thread or task: leave scopes in the "
                "reverse order of entering them, in the thread or task that entered them."
            )
        _current.set(frame.parent)

    def _frame(self, parent: Frame) -> Frame:
        with _lock:
            frame = parent.children.get(self)
            if frame is None:
                frame = parent.children[self] = Frame(self._payload, parent)
                _frames.add(frame)
                frame.finalizer = weakref.finalize(self, _drop, weakref.ref(frame))
                frame.finalizer.atexit = False
            return frame


def _drop(reference: weakref.ref[Frame]) -> None:
    """Forget what was resolved in a frame whose scope is gone: tables hold frames strongly."""
    frame = reference()
    if frame is None:
        return
    with _lock:
        frame.orphaned = True  # a task may still be in it
        if frame.finalizer is not None:
            frame.finalizer.detach()
        for child in list(frame.children.values()):
            _drop(weakref.ref(child))
        for table in _tables:
            table.pop(frame, None)


class Table(dict[Frame, Forward]):
    """What serves one layer on one device, per frame; asks the resolver where it does not know.

    It is read in two ways, by two names:

    - `fast`, an attribute in the instance dictionary of a frame, absent where nothing is published:
      the quickest read there is, for warm eager calls, and what Dynamo sees once a layer is warm.
    - `sure`, a property of the class `Frame` whose getter is this table's `__getitem__`. Dynamo
      evaluates such a property at trace time and in guards instead of tracing into it. So a cold
      layer is resolved outside of the graph; and after a change of mappings the guards themselves
      see the new value, so that code whose answer did not change is not compiled again.

    Once Dynamo saw a table cold, its guards say that `fast` is absent there: it stays absent in
    every frame where it is, and is set in every frame where it was.
    """

    def __init__(self, name: str, reference: Forward, resolve: Callable[[Frame], Forward]) -> None:
        """Make the table whose names are `name` and `name_sure`."""
        super().__init__()
        self.fast = name
        self.sure = f"{name}_sure"
        self._reference = reference
        self._resolve = resolve
        self._busy = threading.RLock()
        self._traced_cold = False
        with _lock:
            _tables.append(self)
            setattr(Frame, self.sure, property(self.__getitem__))

    def __missing__(self, frame: Frame) -> Forward:
        if resolving.get():  # a plugin calls a decorated layer: no recursion, and no lock to wait for
            return self._reference
        with self._busy:  # eight threads, one resolution
            known = self.get(frame)
            if known is not None:
                return known
            generation = _generation
            forward = self._resolve(frame)
            with _lock:
                if generation == _generation and not frame.orphaned:
                    self[frame] = forward
            return forward

    def discard(self) -> None:
        """Take the table away for good."""
        with _lock:
            _tables.remove(self)
            delattr(Frame, self.sure)
            for frame in list(_frames):
                vars(frame).pop(self.fast, None)

    def keep_sure(self) -> None:
        """Publish no more: Dynamo traces the layer where it is cold."""
        with _lock:
            self._traced_cold = True

    def publish(self, frame: Frame, *, again: bool = False) -> Forward:
        """Return what serves in `frame`, and let warm calls find it there."""
        forward = self[frame]
        if again or not self._traced_cold:
            with _lock:
                current = self.get(frame, forward if frame.orphaned else None)
                if (again or not self._traced_cold) and current is forward:
                    setattr(frame, self.fast, forward)
        return forward


def forget() -> None:
    """Drop every resolution: a mapping or a plugin changed.

    What warm calls were using is resolved again at once, and only replaced: to compiled code, going
    back to an earlier mapping then looks exactly as it did before.
    """
    for frame, table in drop():
        table.publish(frame, again=True)


def drop() -> list[tuple[Frame, Table]]:
    """Drop every resolution, and return where warm calls were using one."""
    global _generation
    with _lock:
        _generation += 1
        for table in _tables:
            table.clear()
        published = [(frame, table) for frame in list(_frames) for table in _tables if table.fast in vars(frame)]
        for frame, table in published:
            delattr(frame, table.fast)
    return published
