"""Scopes that are kept for calls that are made again later: by checkpoints and other custom autograd functions."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, overload

import torch

from ..errors import ArgumentTypeError
from ..guards.functions import function_contexts, in_function, outside_functions
from ..torch_internals import DispatchMode, carried, is_traced, saved_tensors_hooks
from ..warning import warn_once
from .frame import CARRIED, Frame, active_frame, here, reset_frame, root, set_frame, unscoped

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_before: ContextVar[tuple[Any, ...]] = ContextVar("kernels_core_before", default=())
"""What to go back to after the innermost `KeptScopes` of this thread or task, and the same for those around it."""
_keeping: ContextVar[Callable[[], object]] = ContextVar("kernels_core_keeping", default=lambda: None)
"""Returns the hook of the innermost checkpoint, if that recomputes in the scopes of its forward."""


class KeptScopes(contextlib.ContextDecorator):
    """Enters the scopes that were open when it was made, and keeps them: for calls that are made again later.

    Other than `Scope`, it may be entered in any thread, while other scopes are open.
    """

    def __init__(self, inner: AbstractContextManager[Any] | None = None) -> None:
        """Take the scopes of this thread or task; `inner` is entered in them."""
        self.frame: Frame = here()
        self._inner = inner or contextlib.nullcontext()
        self._scopes, around = [], self.frame
        while around.parent is not None:  # decisions are dropped with the object of a scope
            self._scopes.append(around.finalizer and around.finalizer.peek())
            around = around.parent

    def __enter__(self) -> KeptScopes:
        """Make them the scopes of this thread or task."""
        # A stack of the thread or task, not of this object: it may be entered in several threads at once.
        _before.set((active_frame(), carried(CARRIED), _keeping.get(), _before.get()))
        set_frame(self.frame)
        note_checkpoint()
        try:
            self._inner.__enter__()
        except BaseException:  # also an interrupt: `__exit__` is not called for a block that was not entered
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Go back to those before."""
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            self._leave()

    def _leave(self) -> None:
        frame, frame_carried, keeping, around = _before.get()
        reset_frame(frame, frame_carried)
        _keeping.set(keeping)
        _before.set(around)


class _Nothing(DispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing. A checkpoint in compiled code wants dispatch modes as its contexts."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator."""
        return func(*args, **(kwargs or {}))


def _nothing() -> Contexts:
    return _Nothing(), _Nothing()  # type: ignore[no-untyped-call]


def _enters(value: object) -> bool:
    return hasattr(type(value), "__enter__") and hasattr(type(value), "__exit__")


def _contexts(inner: Callable[[], Contexts] | None) -> Contexts:
    if is_traced():  # the kernels of the forward are in the graph that is recomputed
        return (inner or _nothing)()
    made: Any = inner() if inner is not None else (None, None)
    if not isinstance(made, tuple | list) or len(made) != 2 or not all(each is None or _enters(each) for each in made):
        raise ArgumentTypeError(f"inner is a context_fn, which returns two context managers; it has returned {made!r}.")
    forward, recomputation = made
    return KeptScopes(forward), KeptScopes(recomputation)


@overload
def checkpoint_scopes() -> Contexts: ...
@overload
def checkpoint_scopes(*, inner: Callable[[], Contexts]) -> Callable[[], Contexts]: ...
def checkpoint_scopes(*, inner: Callable[[], Contexts] | None = None) -> Contexts | Callable[[], Contexts]:
    """Let a checkpoint recompute with the kernels of its forward: its `context_fn`.

    The recomputation is in the scopes in which the checkpoint was called, in whatever thread, also after they were
    left. Without it, it is in those that are open where `backward()` is called. With `use_reentrant=True` the scopes
    are kept by themselves.

    Args:
        inner: Another `context_fn`, such as that of selective checkpointing, whose contexts are entered in the scopes.

    Returns:
        What PyTorch asks for: a context manager for the forward, and one for the recomputation. With `inner`, a
        `context_fn` that returns these.

    Raises:
        ArgumentTypeError: If `inner` cannot be called; where the checkpoint calls it, if it returns no two contexts.

    Example:
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> x = torch.ones(1, requires_grad=True)
        >>> with Scope("fast"):
        ...     y = checkpoint(torch.sin, x, use_reentrant=False, context_fn=checkpoint_scopes)
        >>> y.backward()
        >>> import functools
        >>> keep_products = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        >>> with Scope("fast"):
        ...     y = checkpoint(
        ...         torch.sin, x, use_reentrant=False, context_fn=checkpoint_scopes(inner=keep_products)
        ...     )
        >>> y.backward()
    """
    if inner is None:
        return _contexts(None)
    if not callable(inner):
        raise ArgumentTypeError(f"inner is a context_fn, a function that returns two contexts, not {inner!r}.")
    return functools.partial(_contexts, inner)


def _hook() -> Callable[..., Any] | None:
    hooks = saved_tensors_hooks()
    return hooks[0] if hooks is not None else None


def note_checkpoint() -> None:
    """Remember that the innermost checkpoint, if there is one, recomputes in the scopes of its forward."""
    if (hook := _hook()) is not None:
        _keeping.set(weakref.ref(hook))  # weak: the hook keeps all that its checkpoint saves


def notice_checkpoint() -> None:
    """Warn if a layer is called in a scope and in a checkpoint that was not given `checkpoint_scopes`.

    It is asked where a kernel is decided, or proven to keep gradients: a warm call asks nothing. So it finds the first
    recorded calls in a scope.
    """
    hook = _hook() if torch.is_grad_enabled() else None
    if hook is None or hook is _keeping.get()() or getattr(hook, "__module__", None) != "torch.utils.checkpoint":
        return
    if here() is not root:
        warn_once(
            "A layer is called in a scope and in torch.utils.checkpoint with use_reentrant=False. Where its backward "
            "is called after the scope, other kernels recompute the layer: output and gradient may be of two. Call it "
            "with checkpoint(..., use_reentrant=False, context_fn=kernels_core.checkpoint_scopes), or register the "
            "mapping for the process."
        )


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
                "backward calls the layer again after the scope, that is not in this scope: output and gradient may be "
                "of two kernels. Register the mapping for the process, or keep `run_function`, which the backward "
                "calls, on the context that the forward gets.",
            )


class _InFunction(dict[Frame, bool]):
    """Answers `in_function` as a property of frames: Dynamo reads it while it traces, and again in each guard."""

    def __missing__(self, frame: Frame) -> bool:
        keep_scopes()
        return in_function()  # not kept in the dict: the next call may have another answer


Frame.in_function = property(_InFunction().__getitem__)
Frame.keeps_scopes = property(_InFunction({root: False, unscoped: False}).__getitem__)
