"""Scopes nest, stay in their thread or task, are remembered, and never leak."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import Mode, Scope, ScopeError, resolve
from kernels_core.scopes import frame as frames
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)


@pytest.fixture
def adding(make_kernel: Make) -> Callable[[float], use_kernel_mapping]:
    """Make a scope in which the layer Add adds another number."""
    return lambda added: use_kernel_mapping({"Add": {"cpu": make_kernel(added)}})


def sizes() -> tuple[int, int]:
    """Count living frames, and resolutions in all tables."""
    gc.collect()
    return len(frames._frames), sum(map(len, frames._tables))


def test_scopes_nest(make_layer: Make, adding: Make) -> None:
    """The innermost scope goes first, and the outer one applies again after it."""
    layer, seen = make_layer()(), []
    with adding(10):
        seen.append(layer(X)[0].item())
        with adding(20):
            seen.append(layer(X)[0].item())
        seen.append(layer(X)[0].item())
    seen.append(layer(X)[0].item())
    assert seen == [10, 20, 10, 1]


def test_inner_scope_inherits(make_layer: Make, make_kernel: Make, adding: Make) -> None:
    """An inner scope that does not say a layer leaves it to the outer one, unless inherit_mapping is off."""
    layer = make_layer()()
    register_kernel_mapping({"Add": {"cpu": make_kernel(5)}})
    with adding(10):
        with use_kernel_mapping({"Other": {"cpu": make_kernel(20)}}):
            assert layer(X)[0] == 10
        with use_kernel_mapping({"Other": {"cpu": make_kernel(20)}}, inherit_mapping=False):
            assert layer(X)[0] == 1
            with use_kernel_mapping({}):
                assert layer(X)[0] == 1
        assert layer(X)[0] == 10
    assert layer(X)[0] == 5


def test_same_scope_nested_in_itself(make_layer: Make, adding: Make) -> None:
    """One object can be open twice at once, and is left twice."""
    layer, ten = make_layer()(), adding(10)
    with ten:
        with ten, adding(20), ten:
            assert layer(X)[0] == 10
        assert layer(X)[0] == 10
    assert layer(X)[0] == 1


def test_requests_carry_the_payloads_innermost_first() -> None:
    """LayerRequest.scopes lists the contents of open scopes, innermost first."""
    with Scope("outer"), Scope("inner"):
        assert resolve("X", device="cpu", mode=Mode.INFERENCE).request.scopes == ("inner", "outer")
    assert resolve("X", device="cpu", mode=Mode.INFERENCE).request.scopes == ()


def test_entering_again_resolves_nothing(make_layer: Make, adding: Make, hook_recorder: HookRecorder) -> None:
    """A scope that was open before asks no hook when entered again: directly, under another, in another thread."""
    layer, outer, inner = make_layer()(), adding(10), adding(20)

    def run() -> None:
        with outer:
            assert layer(X)[0] == 10
            with inner:
                assert layer(X)[0] == 20
        with inner:
            assert layer(X)[0] == 20

    run()
    hook_recorder.clear()
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    asyncio.run(asyncio.to_thread(run))
    assert hook_recorder.names() == []


def test_exceptions_leave_scopes(make_layer: Make, adding: Make) -> None:
    """However a block is left, the scope around it is the active one again."""
    layer = make_layer()()
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with contextlib.suppress(error), adding(10), adding(20):
            raise error
        assert frames.root.active is frames.root
    for _ in range(2):
        with adding(10):
            continue
    assert layer(X)[0] == 1


def test_leaving_in_another_order_is_an_error(adding: Make) -> None:
    """A scope that is not the innermost one cannot be left, and nothing changes then."""
    outer, inner = adding(10), adding(20)
    with pytest.raises(ScopeError):
        outer.__exit__(None, None, None)
    outer.__enter__()
    inner.__enter__()
    here = frames.root.active
    with pytest.raises(ScopeError):
        outer.__exit__(None, None, None)
    assert frames.root.active is here
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    assert frames.root.active is frames.root


def test_an_outer_scope_that_is_gone_first(make_layer: Make, adding: Make) -> None:
    """As with generators that are closed in the wrong order: errors, and then the thread is in no scope."""

    def suspended(added: float) -> Generator[None, None, None]:
        with adding(added):
            yield

    layer = make_layer()()
    blocks = [suspended(10), suspended(20), suspended(30)]
    for block in blocks:
        next(block)
    assert layer(X)[0] == 30
    for block in blocks[:2]:
        with pytest.raises(ScopeError):
            block.close()
    gc.collect()
    assert layer(X)[0] == 30
    with pytest.raises(ScopeError):
        blocks[2].close()
    assert layer(X)[0] == 1 and frames.root.active is frames.root
    assert threading.get_ident() not in frames.open_scopes
    with adding(10):
        assert layer(X)[0] == 10


def test_threads_do_not_see_each_others_scopes(make_layer: Make, adding: Make) -> None:
    """A scope counts in the thread that entered it: eight threads with eight scopes never mix."""
    layer, barrier, wrong = make_layer()(), threading.Barrier(8), []

    def work(number: int) -> None:
        with adding(number):
            barrier.wait()
            for _ in range(200):
                if layer(X)[0] != number:
                    wrong.append(number)
            barrier.wait()
        if layer(X)[0] != 1:
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(10 * (i + 1),)) for i in range(8)]
    with adding(99):
        for thread in threads:
            thread.start()
        assert layer(X)[0] == 99
        for thread in threads:
            thread.join()
    assert wrong == []


def test_tasks_do_not_see_each_others_scopes(make_layer: Make, adding: Make) -> None:
    """A scope counts in the asyncio task that entered it and in the tasks that it starts, across awaits."""
    layer = make_layer()()

    async def child() -> float:
        await asyncio.sleep(0)
        return float(layer(X)[0])

    async def task(number: float) -> None:
        assert layer(X)[0] == 1
        with adding(number):
            for _ in range(20):
                await asyncio.sleep(0)
                assert layer(X)[0] == number
            assert await asyncio.create_task(child()) == number
        await asyncio.sleep(0)
        assert layer(X)[0] == 1

    async def main() -> None:
        await asyncio.gather(*(task(10.0 * (i + 1)) for i in range(8)))

    asyncio.run(main())


def test_generators_give_the_scope_back(make_layer: Make, adding: Make) -> None:
    """A generator suspended inside a scope gives it back when exhausted, closed, thrown into or dropped."""
    layer = make_layer()()

    def numbers() -> Iterator[float]:
        with adding(10):
            yield float(layer(X)[0])
            yield float(layer(X)[0])

    assert list(numbers()) == [10, 10]
    assert frames.root.active is frames.root

    closed = numbers()
    assert next(closed) == 10
    closed.close()  # type: ignore[attr-defined]
    assert frames.root.active is frames.root

    thrown = numbers()
    assert next(thrown) == 10
    with pytest.raises(KeyError):
        thrown.throw(KeyError)  # type: ignore[attr-defined]
    assert frames.root.active is frames.root

    dropped = numbers()
    assert next(dropped) == 10
    del dropped
    gc.collect()
    assert frames.root.active is frames.root
    assert layer(X)[0] == 1


def test_context_manager_and_exit_stack(make_layer: Make, adding: Make) -> None:
    """Scopes work in contextlib.contextmanager, ExitStack and asynccontextmanager."""
    layer = make_layer()()

    @contextlib.contextmanager
    def fast() -> Iterator[None]:
        with adding(10):
            yield

    @contextlib.asynccontextmanager
    async def faster() -> AsyncIterator[None]:
        with adding(30):
            yield

    async def main() -> None:
        async with faster():
            assert layer(X)[0] == 30

    with fast():
        assert layer(X)[0] == 10
    with contextlib.ExitStack() as stack:
        stack.enter_context(adding(10))
        stack.enter_context(adding(20))
        assert layer(X)[0] == 20
    asyncio.run(main())
    assert layer(X)[0] == 1


def test_transient_scopes_do_not_grow_anything(make_layer: Make, adding: Make) -> None:
    """Hundreds of scopes made, nested, used and dropped leave no frame and no resolution behind."""
    layer, long_lived = make_layer()(), adding(7)
    layer(X)
    with long_lived:
        layer(X)
    before = sizes()
    for number in range(200):
        with adding(number), long_lived, adding(number + 0.5):
            layer(X)
            with contextlib.suppress(ValueError), adding(3):
                layer(torch.zeros(2, requires_grad=True))
                raise ValueError
    assert sizes() == before
    with long_lived:
        assert layer(X)[0] == 7


def test_frames_go_with_their_scope(make_layer: Make, adding: Make) -> None:
    """The frame of a scope is collected once the scope is, although the layer that used it lives on."""
    layer, ten = make_layer()(), adding(10)
    with ten:
        layer(X)
        frame = weakref.ref(frames.root.active)
    assert frame() is not None
    del ten
    gc.collect()
    assert frame() is None


def test_kernels_go_with_their_scope(make_layer: Make, make_kernel: Make) -> None:
    """A kernel class or function that only a transient scope named is collected with it."""
    layer = make_layer()()
    kernel = make_kernel(10)
    seen = weakref.ref(kernel)
    with use_kernel_mapping({"Add": {"cpu": kernel}}):
        assert layer(X)[0] == 10
    del kernel
    gc.collect()
    assert seen() is None


def test_task_that_outlives_its_scope_leaves_nothing(make_layer: Make, adding: Make) -> None:
    """A task started inside a scope goes on in it after the block; when both are gone, so is the frame."""
    layer = make_layer()()
    layer(X)

    async def child(gate: asyncio.Event) -> float:
        await gate.wait()
        return float(layer(X)[0]) + float(layer(X)[0])

    async def main() -> None:
        gates = [asyncio.Event() for _ in range(5)]
        tasks = []
        for number, gate in enumerate(gates):
            with adding(10 + number):
                tasks.append(asyncio.create_task(child(gate)))
        await asyncio.sleep(0)
        gc.collect()
        for gate in gates:
            gate.set()
        assert await asyncio.gather(*tasks) == [20, 22, 24, 26, 28]

    before = sizes()
    asyncio.run(main())
    assert sizes() == before


def test_decorated_functions_do_not_grow_the_tables() -> None:
    """Layers decorated inside a function are collected when dropped, with their tables."""
    from kernels_core import use_kernel_forward_from_hub

    def make() -> None:
        @use_kernel_forward_from_hub("Local")
        class Local(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        Local()(X)

    make()
    gc.collect()
    before = len(frames._tables)
    for _ in range(20):
        make()
    gc.collect()
    assert len(frames._tables) <= before


def test_dropping_one_layer_leaves_the_others(make_layer: Make, make_kernel: Make) -> None:
    """A layer that is collected takes its own tables along, and changes still reach the layers that live on."""
    survivors = [make_layer(f"Survivor{i}")() for i in range(3)]
    dropped = make_layer("Dropped")  # not called: its table is as empty as theirs
    del dropped
    gc.collect()
    assert [layer(X)[0].item() for layer in survivors] == [1, 1, 1]
    register_kernel_mapping({f"Survivor{i}": {"cpu": make_kernel(10 + i)} for i in range(3)})
    assert [layer(X)[0].item() for layer in survivors] == [10, 11, 12]


def test_layers_that_are_collected_while_answers_are_dropped(make_layer: Make) -> None:
    """A garbage collection in the middle of a change withdraws names of which the change has a list already."""

    class Collects:
        def __del__(self) -> None:
            gc.collect()

    for number in range(20):  # the names are in a set, whose order differs
        layers = [make_layer(f"Collected{number}_{i}") for i in range(4)]
        for layer in layers:
            layer()(X)
        frames.publish(frames.root, "collects", Collects(), frames.generation())
        gc.collect()
        gc.disable()
        try:
            del layer, layers
            frames.forget()
        finally:
            gc.enable()
        assert not frames.root.published


def test_scope_is_dropped_while_other_threads_use_theirs(make_layer: Make, adding: Make) -> None:
    """Scopes made and dropped in several threads at once neither fail nor leave anything behind."""
    layer, errors = make_layer()(), []
    layer(X)
    before = sizes()

    def work(number: float) -> None:
        try:
            for _ in range(60):
                with adding(number), adding(number + 1):
                    assert layer(X)[0] == number + 1
                assert layer(X)[0] == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(10.0 * i,)) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sizes() == before
