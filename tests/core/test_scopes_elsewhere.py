"""Scopes in the threads of autograd, in other threads, and in processes that are started in them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from warned import noted

from kernels_core import KernelsWarning, checkpoint_scopes, torch_internals, use_kernel_forward_from_hub
from kernels_core.scopes.frame import here, root
from kernels_core.scopes.kept import KeptScopes
from kernels_plugins.mapping import use_kernel_mapping

CARRIES_CONTEXT = torch_internals.release >= (2, 13)
"""Whether autograd brings the context of the caller into its own threads."""


@use_kernel_forward_from_hub("Times")
class Times(nn.Module):
    """Doubles."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `2 * x`."""
        return x * 2


def times(factor: float) -> use_kernel_mapping:
    """Return a scope with a kernel whose output and gradient show its factor."""
    forward: Any = lambda self, x: x * factor  # noqa: E731
    return use_kernel_mapping({"Times": {"cpu": type("Kernel", (nn.Module,), {"forward": forward})}})


def call() -> float:
    """Return the factor of the kernel that serves here."""
    return float(Times()(torch.ones(1)).item())


class Deep(torch.autograd.Function):
    """Calls a function in its backward. A backward in 61 others runs in a thread of autograd, on a CPU, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Callable[[], Any], depth: int) -> Any:
        ctx.function, ctx.depth, ctx.x = function, depth, x.detach()
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.depth == 0:
            ctx.function()
        else:
            with torch.enable_grad():
                y: Any = Deep.apply(ctx.x.requires_grad_(), ctx.function, ctx.depth - 1)
            y.backward()
        return gradient, None, None


def in_backward(function: Callable[[], Any] = call) -> Any:
    """Return the result of a function, called in a thread of autograd by a backward that is started here."""
    found: list[Any] = []

    def run() -> None:
        found.extend((function(), threading.get_ident()))

    y: Any = Deep.apply(torch.ones(1, requires_grad=True), run, 61)
    y.backward()
    assert found[1] != threading.get_ident()
    return found[0]


def warned(function: Callable[[], Any]) -> list[str]:
    """Call a function, and return the warnings of ours that it caused."""
    with noted() as caught:
        function()
    return [str(w.message) for w in caught if issubclass(w.category, KernelsWarning)]


def test_a_backward_in_a_thread_of_autograd_is_in_the_scopes_of_its_caller() -> None:
    """Scopes that are nested, entered and left there, and gone: its thread serves whoever calls `backward()` next."""
    three, four = times(3), times(4)

    def nested() -> list[float]:
        with four:
            found = [call()]
            with use_kernel_mapping({}, inherit_mapping=False):
                found.append(call())
        return [*found, call()]

    assert in_backward() == 2
    with three:
        assert in_backward() == 3
        assert in_backward(nested) == [4, 2, 3]
        with four:
            assert in_backward() == 4
        assert in_backward() == 3
    assert in_backward(nested) == [4, 2, 2]
    assert in_backward() == 2


def test_a_backward_of_a_task_or_a_copied_context_is_in_its_scopes() -> None:
    """Beside a task that is in a scope, one that is not; before PyTorch 2.13, both are in none there."""
    three, found, expected = times(3), list[Any](), 3 if CARRIES_CONTEXT else 2
    with three:
        context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: found.append(context.run(in_backward)))
    thread.start()
    thread.join()
    assert found == [expected]

    async def task(scope: Any, mine: asyncio.Event, other: asyncio.Event) -> float:
        with scope:
            mine.set()
            await other.wait()
            call()
            return float(in_backward())

    async def tasks() -> list[float]:
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(three, one, two), task(contextlib.nullcontext(), two, one))

    assert asyncio.run(tasks()) == [expected, 2]


def test_a_checkpoint_recomputes_in_a_thread_of_autograd() -> None:
    """With `checkpoint_scopes` in the scopes of its forward, without it in those of the backward."""
    for options, factor in (({"context_fn": checkpoint_scopes}, 3.0), ({}, 4.0)):
        x = torch.ones(1, requires_grad=True)
        with times(3):
            y = checkpoint(lambda x: Times()(x).sin(), x, use_reentrant=False, **options)  # type: ignore[arg-type]
        with times(4):
            in_backward(y.backward)
        assert x.grad is not None and x.grad.item() == pytest.approx(3 * torch.tensor(factor).cos().item())


def test_two_threads_recompute_at_once() -> None:
    """Each of them goes back to its own scopes, in whatever order they leave those that they share."""
    with times(3):
        kept = KeptScopes()
    first, second, found = threading.Event(), threading.Event(), list[float]()

    def work() -> None:
        with times(4):
            with kept:
                first.set()
                second.wait()
            found.append(call())

    thread = threading.Thread(target=work)
    thread.start()
    first.wait()
    with kept:
        second.set()
        thread.join()
    assert found == [4] and here() is root


def test_a_thread_outside_of_the_scopes_of_another_is_reported() -> None:
    """Once, at its first call, with the cure; not if it enters a scope itself, nor in a copy of the context."""
    found: list[float] = []

    def in_pool(function: Callable[[], float]) -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            return warned(lambda: found.append(pool.submit(function).result()))

    def scoped() -> float:
        with times(4):
            assert call() == 4
        return call()

    assert not in_pool(call)
    with times(3):
        assert not in_pool(scoped)
        assert not in_pool(functools.partial(contextvars.copy_context().run, call))
        (text,) = in_pool(call)
        assert "contextvars.copy_context().run" in text and "ThreadPoolExecutor" in text
        assert not in_pool(call)
    assert found == [2, 2, 3, 2, 2]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_is_started_in_a_scope_is_reported(method: str) -> None:
    """One that takes nothing of this process along: a warning names the cure as it is started."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    process: Any = multiprocessing.get_context(method).Process(target=print)  # type: ignore[attr-defined]
    set_spawning_popen(object())  # type: ignore[arg-type]
    try:
        assert not warned(lambda: ForkingPickler.dumps(process))
        with times(3):
            (text,) = warned(lambda: ForkingPickler.dumps(process))
    finally:
        set_spawning_popen(None)
    assert "Enter the scope in the function that the process runs" in text
