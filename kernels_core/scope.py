"""Scopes, and the frames that keep the decisions made in each of them.

A `Scope` is a context manager that plugins make. Entering it under another scope makes a `Frame`,
which the dispatcher reads. The innermost frame of this thread or task is a context variable.
"""

from __future__ import annotations

import contextlib
import copyreg
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from .errors import ScopeError
from .guards.functions import function_contexts, in_function, outside_functions
from .layer import Forward
from .warning import warn_once

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
    """The answer of `in_function` for traced calls, with `keep_scopes`. Set below."""

    def __init__(self, payload: object = None, parent: Frame | None = None, key: int = 0) -> None:
        self.payload = payload
        self.parent = parent
        self.key = key
        self.children: dict[int, Frame] = {}  # by the id of their scope, whose finalizer removes them
        self.finalizer: weakref.finalize[[weakref.ref[Frame]], Scope] | None = None
        self.published: set[str] = set()
        self.tables: set[FrameTable] = set()
        self.orphaned = False

    def __reduce__(self) -> str:
        """Pickle the root by its name, for pickles by value of decorated functions; no other frame."""
        if self is not root:
            raise TypeError("cannot pickle an open scope: the process that loads it opens its own")
        return "root"

    def payloads(self) -> tuple[object, ...]:
        """Return the payloads of the open scopes, innermost first."""
        here, found = self, []
        while here.parent is not None:
            found.append(here.payload)
            here = here.parent
        return tuple(found)


root = Frame()

_current: ContextVar[Frame] = ContextVar("kernels_core_frame", default=root)


class _Nowhere:
    """The frames of a copied forward, whose code has names of the process that it comes from: nothing is found."""

    get = object


def _copied(variable: ContextVar[Any]) -> Any:
    """Pickle the variable, for pickles by value of decorated functions; no other one."""
    if variable is not _current:
        raise TypeError("cannot pickle 'ContextVar' object")
    return _Nowhere, ()


copyreg.pickle(ContextVar, _copied)

active_frame = _current.get
"""Returns `root.active`, a little quicker, where Dynamo does not look."""

# The getter is implemented in C, so Dynamo evaluates and guards this attribute instead of tracing
# into it. (Called with an argument, `ContextVar.get` takes it as the default: here that is the root.)
Frame.active = property(_current.get)

_lock = threading.RLock()
listeners: list[Callable[[], None]] = []
"""Called when every decision was dropped."""

_tables: weakref.WeakSet[FrameTable] = weakref.WeakSet()
_frames: weakref.WeakSet[Frame] = weakref.WeakSet([root])
_generation = 0


class Scope:
    """A context manager in which dispatch may decide otherwise.

    Plugins find its payload in `LayerRequest.scopes`, innermost scope first. Scopes nest, are active only in
    the thread or asyncio task that entered them, and can be entered any number of times, also by several
    threads at once: decisions made inside are kept as long as the object lives.

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
        if (frame := parent.children.get(id(self))) is None:
            with _lock:  # several threads may enter this scope for the first time
                if (frame := parent.children.get(id(self))) is None:
                    frame = parent.children[id(self)] = Frame(self._payload, parent, id(self))
                    _frames.add(frame)
                    frame.finalizer = weakref.finalize(self, _drop, weakref.ref(frame))
                    frame.finalizer.atexit = False
        # No token to reset: one object may be entered many times, and by several threads at once.
        _current.set(frame)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back to the scope around this one."""
        frame = active_frame()
        if frame.key != id(self) or frame.orphaned or frame.parent is None:
            raise ScopeError(
                "This scope is not the innermost one of this thread or task: leave scopes in the "
                "reverse order of entering them, in the thread or task that entered them."
            )
        _current.set(frame.parent)


class KeptScopes(contextlib.ContextDecorator):
    """Enters the scopes that were open when it was made, and keeps them: for calls that are made again later.

    Other than `Scope`, it may be entered in any thread, while other scopes are open.
    """

    def __init__(self) -> None:
        """Take the scopes of this thread or task."""
        self.frame: Frame = active_frame()
        self._before: list[Frame] = []  # a stack: it may be entered in several threads and in itself
        self._scopes, around = [], self.frame
        while around.parent is not None:  # decisions are dropped with the object of a scope
            self._scopes.append(around.finalizer and around.finalizer.peek())
            around = around.parent

    def __enter__(self) -> KeptScopes:
        """Make them the scopes of this thread or task."""
        self._before.append(active_frame())
        _current.set(self.frame)
        return self

    def __exit__(self, *error: object) -> None:
        """Go back to those before."""
        _current.set(self._before.pop())


def checkpoint_scopes() -> tuple[contextlib.AbstractContextManager[object], contextlib.AbstractContextManager[object]]:
    """Let a checkpoint recompute in the scopes in which it was called: its `context_fn`.

    Without it, the recomputation is in the scopes that are open where `backward()` runs; on a GPU, in none, for
    autograd has threads of its own. With `use_reentrant=True` this is done by itself.

    Returns:
        What PyTorch asks for: a context manager for the forward, which does nothing, and one for the recomputation.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> x = torch.ones(1, requires_grad=True)
        >>> with Scope("fast"):
        ...     y = checkpoint(torch.sin, x, use_reentrant=False, context_fn=checkpoint_scopes)
        >>> y.backward()
    """
    return contextlib.nullcontext(), KeptScopes()


def keep_scopes() -> None:
    """Let the custom autograd functions in whose forward this is recompute in the scopes in which they were called."""
    if outside_functions() or not in_function():
        return
    for context in function_contexts():
        is_class = isinstance(context, type)  # with `setup_context`, there is no context yet that could keep them
        if not is_class and "kernels_scopes" in vars(context):
            continue
        kept = KeptScopes()
        if not is_class:
            context.kernels_scopes = kept
            if hasattr(context, "run_function"):  # of checkpoints: those of PyTorch, DeepSpeed, Megatron and fairscale
                context.run_function = kept(context.run_function)
                continue
        if kept.frame is not root:
            name = context.__qualname__ if is_class else type(context).__qualname__
            warn_once(
                f"A layer is called in a scope and in the forward of {name}, a custom autograd function. If its "
                "backward calls the layer again, that is not in this scope on a GPU: output and gradient may be of two "
                "kernels. Register the mapping for the process, or keep `run_function`, which the backward calls, on "
                "the context that the forward gets.",
            )


class _InFunction(dict[Frame, bool]):
    """Answers `in_function` as a property of frames: Dynamo reads it while it traces, and again in each guard."""

    def __missing__(self, frame: Frame) -> bool:
        keep_scopes()
        return in_function()  # not kept in the dict: the next call may have another answer


Frame.in_function = property(_InFunction().__getitem__)


def _drop(reference: weakref.ref[Frame]) -> None:
    """Take a frame whose scope is gone out of the tables: they hold frames strongly."""
    if (frame := reference()) is None:
        return
    with _lock:
        frame.orphaned = True  # a task may still be in it
        if frame.parent is not None:
            frame.parent.children.pop(frame.key, None)
        if frame.finalizer is not None:
            frame.finalizer.detach()
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
        lock = self._busy.lock
        if not lock.acquire(timeout=PATIENCE):
            return self._reference
        try:
            if (known := self.get(frame)) is not None:
                return known
            before = _generation
            forward = self._resolve(frame)
            with _lock:
                if before == _generation and not frame.orphaned:
                    self[frame] = forward
                    frame.tables.add(self)
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
            setattr(frame, name, answer)
            frame.published.add(name)
    if frame is root is active_frame():
        _current.set(root)  # CPython caches the value of a variable that is set, but looks its default up at each read


def forget() -> None:
    """Drop every decision: a mapping or a plugin changed."""
    global _generation
    with _lock:
        _generation += 1
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
