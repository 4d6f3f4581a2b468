"""Sources that could not be reached: served by the reference, and by their kernel once they can, by themselves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import nn

from kernels_core import (
    KernelizeError,
    KernelizeFallback,
    KernelsWarning,
    Mode,
    NoKernelError,
    kernelize,
    loading,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import use_kernel_mapping

X = torch.ones(2)


@use_kernel_forward_from_hub("Times")
class Times(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Fast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


class Remote:
    """A source that raises these errors, one at each attempt, and then loads."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.loaded = 0

    def load(self) -> type[nn.Module]:
        self.loaded += 1
        if self.errors:
            raise self.errors.pop(0)
        return Fast


def until(condition: Callable[[], Any]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(loading, "RETRY_AFTER", 0.01)
    monkeypatch.setattr(loading, "RETRY_AT_MOST", 0.01)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow")])
def test_a_source_that_could_not_be_reached_serves_later(error: Exception, mapping_plugin: object) -> None:
    """The reference runs, with a reason; the kernel serves when it can be loaded, and no call loaded it again."""
    source, layer = Remote(error, ConnectionError("still down")), Times()
    threads = set()
    load = source.load
    source.load = lambda: (threads.add(threading.current_thread()), load())[1]  # type: ignore[method-assign]
    with use_kernel_mapping({"Times": {"cpu": source}}):
        with pytest.warns(KernelsWarning, match="loaded again in the background"):
            assert layer(X)[0] == 2
        until(lambda: layer(X)[0] == 3)
        assert source.loaded == 3 and len(threads - {threading.main_thread()}) == 1
        assert resolve(Times, device="cpu", mode=Mode.INFERENCE).refusals == ()
    until(lambda: loading._retrying is None)  # the thread ends with its work


def test_another_error_is_found_by_the_next_call(mapping_plugin: object) -> None:
    """A source that can be reached, and has another fault, is refused for that fault."""
    source, layer = Remote(ConnectionError("down"), ValueError("no such layer"), ValueError("no such layer")), Times()
    with use_kernel_mapping({"Times": {"cpu": source}}), pytest.warns(KernelsWarning):
        assert layer(X)[0] == 2
        until(lambda: "no such layer" in str(resolve(Times, device="cpu", mode=Mode.INFERENCE)))
        assert layer(X)[0] == 2
    attempts = source.loaded
    time.sleep(0.05)
    assert source.loaded == attempts == 3


def test_kernelized_models_get_the_kernel_later(mapping_plugin: object) -> None:
    """A model that was kernelized while a source could not be reached decides by itself, and gets the kernel."""
    source = Remote(ConnectionError("down"))
    with use_kernel_mapping({"Times": {"cpu": source}}):
        with pytest.warns(KernelsWarning):
            model: nn.Module = kernelize(Times(), mode=Mode.INFERENCE, device="cpu", use_fallback=KernelizeFallback.ALL)
        until(lambda: model(X)[0] == 3)


def test_errors_have_the_cause(mapping_plugin: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a model or call that must not run its reference has the first refusal's error as its cause."""
    fault = SyntaxError("a kernel that cannot be compiled")
    with use_kernel_mapping({"Times": {"cpu": [Remote(fault), Remote(ValueError("second"))]}}):
        with pytest.raises(KernelizeError) as caught:
            kernelize(Times(), mode=Mode.INFERENCE, device="cpu", use_fallback=False)
        assert caught.value.__cause__ is fault
        monkeypatch.setenv("KERNELS_STRICT", "1")
        with pytest.raises(NoKernelError) as raised:
            Times()(X)
        assert raised.value.__cause__ is fault


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_waits_for_no_thread_that_resolves(mapping_plugin: object) -> None:
    """A child of a process in which another thread loads a kernel loads it by itself, at once."""
    loading_now, finish = threading.Event(), threading.Event()

    class Slow:
        def load(self) -> type[nn.Module]:
            if threading.current_thread() is not threading.main_thread():
                loading_now.set()
                finish.wait(PATIENCE)
            return Fast

    layer, mapping = Times(), use_kernel_mapping({"Times": {"cpu": Slow()}})

    def call() -> None:
        with mapping:
            layer(X)

    thread = threading.Thread(target=call)
    thread.start()
    assert loading_now.wait(PATIENCE)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with mapping:
            served = layer(X)[0] == 3
        os._exit(7 if served and time.monotonic() - start < PATIENCE / 9 else 1)  # a minute: that of a lock
    _, status = os.waitpid(child, 0)
    finish.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7
