"""Threads at once: one load, one resolution, no deadlock, no recursion without end."""

from __future__ import annotations

import builtins
import contextvars
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import nn
from warned import ignored, noted

from kernels_core import Candidate, Mode, PluginManager, dispatch, hookimpl, resolve, use_kernel_forward_from_hub
from kernels_core.testing import HookRecorder
from kernels_plugins.mapping import register_kernel_mapping, use_kernel_mapping

Make = Callable[..., Any]
X = torch.zeros(2)

SOON = PATIENCE / 9
"""Seconds, less than those after which a thread stops to wait for another."""


class Slow:
    """A source that takes its time to load, and counts how often it is asked."""

    def __init__(self, kernel: type[nn.Module]) -> None:
        self.kernel = kernel
        self.loads = 0

    def load(self) -> type[nn.Module]:
        self.loads += 1
        time.sleep(0.1)
        return self.kernel


def together(jobs: Iterable[Callable[[], Any]], seconds: float = PATIENCE) -> list[Any]:
    """Start all jobs at the same moment, each in a thread; return results, or fail if one does not end."""
    jobs = list(jobs)
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(index: int, job: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[index] = job()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return results


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_first_call_from_eight_threads_loads_once(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, hook_recorder: HookRecorder, device: str
) -> None:
    """Eight first calls at once load the kernel once, announce one decision, and all run it."""
    layer, source = make_layer()(), Slow(make_kernel(10))
    x = torch.zeros(2, device=device)

    class Offers:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            return [Candidate(source)]

    isolated_plugins.register(Offers())
    results = together([lambda: layer(x)] * 8)
    assert all(isinstance(result, torch.Tensor) for result in results), results
    if device == "cpu":
        assert [result[0].item() for result in results] == [10] * 8
    assert source.loads == 1
    modes = {call.arguments["resolution"].request.mode for call in hook_recorder.of("kernels_resolved")}
    assert len(hook_recorder.of("kernels_resolved")) == len(modes)


def test_layers_that_share_a_source_load_it_once(make_layer: Make, make_kernel: Make) -> None:
    """Eight layers with one source, called for the first time at once, load it once."""
    source = Slow(make_kernel(10))
    layers = [make_layer(f"Add{i}")() for i in range(8)]
    register_kernel_mapping({f"Add{i}": {"cpu": source} for i in range(8)})
    results = together([lambda layer=layer: layer(X)[0].item() for layer in layers])  # type: ignore[misc]
    assert results == [10] * 8
    assert source.loads == 1


def test_failing_load_is_tried_once_by_eight_threads(make_layer: Make, hook_recorder: HookRecorder) -> None:
    """A source that fails is tried once, with one notification and one warning; all threads run the reference."""

    class Fails:
        loads = 0

        def load(self) -> Any:
            self.loads += 1
            time.sleep(0.05)
            raise OSError("no network")

    layer, source = make_layer()(), Fails()
    register_kernel_mapping({"Add": {"cpu": source}})
    with noted() as caught:
        results = together([lambda: layer(X)[0].item()] * 8)
    assert results == [1] * 8
    assert source.loads == 1
    assert len(hook_recorder.of("kernels_kernel_failed")) == 1
    assert len([w for w in caught if "no network" in str(w.message)]) == 1


def test_changes_while_others_call(make_layer: Make, make_kernel: Make) -> None:
    """While mappings change, callers get an answer of one mapping or the other, and the last one in the end."""
    layer, kernels, stop = make_layer()(), [make_kernel(10), make_kernel(20)], threading.Event()

    def change() -> None:
        try:
            for turn in range(60):
                register_kernel_mapping({"Add": {"cpu": kernels[turn % 2]}})
        finally:
            stop.set()

    def call() -> set[float]:
        seen = set()
        while not stop.is_set():
            seen.add(layer(X)[0].item())
        return seen

    results = together([change, *[call] * 4])
    assert not [result for result in results if isinstance(result, BaseException)]
    assert set().union(*results[1:]) <= {1, 10, 20}
    assert layer(X)[0] == 20


def test_change_is_seen_by_a_thread_that_resolves(make_layer: Make, make_kernel: Make) -> None:
    """A mapping registered while a thread is loading the old kernel is in force after both are done."""
    loading, go_on = threading.Event(), threading.Event()
    old = make_kernel(10)

    class Waits:
        def load(self) -> Any:
            loading.set()
            assert go_on.wait(PATIENCE)
            return old

    layer = make_layer()()
    register_kernel_mapping({"Add": {"cpu": Waits()}})

    def change() -> None:
        assert loading.wait(PATIENCE)
        threading.Timer(0.1, go_on.set).start()
        register_kernel_mapping({"Add": {"cpu": make_kernel(20)}})

    results = together([lambda: layer(X)[0].item(), change])
    assert results[0] in (10, 20) and results[1] is None
    assert layer(X)[0] == 20


def test_plugin_that_calls_the_layer_while_resolving(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """Hooks and sources that call the very layer that is being resolved get its reference, and nothing recurses."""
    layer, other, seen = make_layer()(), make_layer("Other")(), []
    kernel = make_kernel(10)

    class Source:
        def load(self) -> Any:
            seen.append(("load", layer(X)[0].item(), other(X)[0].item()))
            return kernel

    class Curious:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            seen.append(("find", layer(X)[0].item(), other(X)[0].item()))
            return [Candidate(source)] if request.layer_name == "Add" else None

        @hookimpl
        def kernels_resolved(self, resolution: Any) -> None:
            seen.append(("resolved", layer(X)[0].item(), other(X)[0].item()))

    source = Source()
    isolated_plugins.register(Curious())
    assert together([lambda: layer(X)[0].item()]) == [10]
    assert {name for name, *_ in seen} == {"find", "load", "resolved"}
    assert {values for _, *values_ in seen for values in [tuple(values_)]} == {(1, 1)}


def test_plugin_that_registers_while_resolving(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager
) -> None:
    """A hook that registers a mapping or a plugin while a layer is resolved neither hangs nor is lost."""
    layer, warm = make_layer()(), make_layer("Warm")()
    warm(X)

    class Late:
        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            return None

    class Registers:
        done = False

        @hookimpl
        def kernels_find_candidates(self, request: Any) -> Any:
            if not self.done:
                self.done = True
                register_kernel_mapping({"Add": {"cpu": make_kernel(10)}})
                isolated_plugins.register(Late(), "late")

    isolated_plugins.register(Registers(), "registers")
    together([lambda: layer(X)])
    assert together([lambda: layer(X)[0].item(), lambda: warm(X)[0].item()]) == [10, 1]


@pytest.mark.parametrize("hook", ["kernels_kernel_failed", "kernels_resolved", "kernels_find_candidates", "load"])
def test_plugin_that_asks_again_while_resolving(
    make_layer: Make, make_kernel: Make, isolated_plugins: PluginManager, hook: str
) -> None:
    """A hook or a source that calls resolve() for the layer in question gets an answer or an error, not a hang."""
    layer = make_layer()()

    class Source:
        def load(self) -> Any:
            if hook == "load":
                resolve(layer, device="cpu", mode=Mode.INFERENCE)
            if hook == "kernels_kernel_failed":
                raise OSError("no network")
            return make_kernel(10)

    class Asks:
        pass

    if hook != "load":
        exec(
            f"def {hook}(): resolve(layer, device='cpu', mode=mode)",
            scope := {"resolve": resolve, "layer": layer, "mode": Mode.INFERENCE},
        )
        plugin = type("Asks", (), {hook: staticmethod(hookimpl(scope[hook]))})
        isolated_plugins.register(plugin, "asks")
    register_kernel_mapping({"Add": {"cpu": Source()}})
    with ignored():
        result = together([lambda: layer(X)[0].item()], seconds=SOON)[0]
    assert result in (1, 10)
    assert result == 10 or hook != "kernels_resolved"


def test_load_that_waits_for_a_thread_that_calls_the_layer(make_layer: Make, make_kernel: Make) -> None:
    """A source that loads in a worker thread, where the layer is called, does not wait for ever."""
    layer, kernel = make_layer()(), make_kernel(10)

    class Parallel:
        def load(self) -> Any:
            context = contextvars.copy_context()  # as asyncio.to_thread does, and executors of libraries
            worker = threading.Thread(target=context.run, args=(layer, X), daemon=True)
            worker.start()
            worker.join(PATIENCE)
            assert not worker.is_alive()
            return kernel

    register_kernel_mapping({"Add": {"cpu": Parallel()}})
    assert together([lambda: layer(X)[0].item()]) == [10]


def test_scopes_in_many_threads_share_what_was_resolved(
    make_layer: Make, make_kernel: Make, hook_recorder: HookRecorder
) -> None:
    """One scope object entered by eight threads at once resolves once, and applies in each."""
    layer, source = make_layer()(), Slow(make_kernel(10, can_torch_compile=True))
    inside = use_kernel_mapping({"Add": {"cpu": source}})

    def work() -> float:
        with inside:
            return float(layer(X)[0])

    assert together([work] * 8) == [10] * 8
    assert source.loads == 1
    assert len(hook_recorder.of("kernels_resolved")) == 1


def test_decorating_in_threads() -> None:
    """Layers decorated in eight threads at once get a number each, and are served apart."""

    def work(number: int) -> float:
        @use_kernel_forward_from_hub(f"Made{number}")
        def made(x: torch.Tensor) -> torch.Tensor:
            return x

        with use_kernel_mapping({f"Made{number}": {"cpu": lambda x: x + number}}):
            return float(made(X)[0])

    assert together([lambda n=n: work(n) for n in range(8)]) == list(range(8))  # type: ignore[misc]


def test_import_that_calls_a_layer_which_another_thread_resolves(
    make_layer: Make, make_kernel: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that wait for each other, one for an import and one for a resolution, go on after a while."""
    monkeypatch.setattr(dispatch, "PATIENCE", 0.5)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "calls_at_import.py").write_text(
        "import builtins\nbuiltins._importing.set()\nbuiltins._loading.wait()\nbuiltins._call()\n"
    )
    layer, kernel, importing, loading = make_layer()(), make_kernel(10), threading.Event(), threading.Event()
    for name, value in {"_importing": importing, "_loading": loading, "_call": lambda: layer(X)}.items():
        monkeypatch.setattr(builtins, name, value, raising=False)

    class Source:
        def load(self) -> Any:
            loading.set()
            importlib.import_module("calls_at_import")
            return kernel

    def call() -> float:
        importing.wait(PATIENCE)
        return float(layer(X)[0])

    register_kernel_mapping({"Add": {"cpu": Source()}})
    served, imported = together([call, lambda: importlib.import_module("calls_at_import")], seconds=SOON)
    assert served == 10 and not isinstance(imported, BaseException)
    sys.modules.pop("calls_at_import", None)
