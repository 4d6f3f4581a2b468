"""Observers: quiet until switched on, by name or by registering; then they report decisions and calls."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from prometheus_client import CollectorRegistry, generate_latest
from torch import nn

from kernels_core import (
    ArgumentError,
    KernelsWarning,
    Mode,
    PluginError,
    PluginLoadError,
    PluginManager,
    forget,
    kernelize,
    use_kernel_forward_from_hub,
)
from kernels_core.models.choice import choices
from kernels_core.scopes.frame import root
from kernels_plugins import (
    LocalLayerRepository,
    LogResolutions,
    ProfileRanges,
    PrometheusCounters,
    use_kernel_mapping,
)
from kernels_plugins.observe import plugin as observe
from kernels_plugins.observe.plugin import observed


@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class FastScale(nn.Module):
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


class InferenceScale(nn.Module):
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2


FAST = f"{__name__}.FastScale"


@pytest.fixture
def manager(isolated_plugins: PluginManager, mapping_plugin: object) -> PluginManager:
    """A plugin manager with `mapping` and `observe`, as an entry point has it."""
    isolated_plugins.register(observe, "observe")
    return isolated_plugins


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    choices.clear()  # kernelized models that other tests left, or that Dynamo keeps, would be observed, too
    monkeypatch.delenv("KERNELS_OBSERVE", raising=False)
    yield
    forget()


def call(*sources: object, grad: bool = False) -> torch.Tensor:
    with use_kernel_mapping({"Scale": {"cpu": list(sources)}}):
        return Scale()(torch.ones(2, requires_grad=grad))


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["origin"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }


# --- Off -----------------------------------------------------------------------------------------


def test_off_nothing_is_around_a_call(manager: PluginManager, caplog: pytest.LogCaptureFixture) -> None:
    """The forward of warm calls is the kernel itself, and nothing is logged."""
    caplog.set_level(logging.DEBUG, "kernels_core")
    mapping = use_kernel_mapping({"Scale": {"cpu": FastScale}})
    with mapping:
        Scale()(torch.ones(2, requires_grad=True))  # recorded: the kernel proves that it keeps gradients
        names = [name for name in root.active.published if not name.endswith("_proving")]
        published = [getattr(root.active, name) for name in names]
    assert published == [FastScale.forward]
    assert not caplog.records


@pytest.mark.parametrize("value", ["", " ", "0", "off", "No", "false"])
def test_words_for_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """None of them switches anything on."""
    monkeypatch.setenv("KERNELS_OBSERVE", value)
    assert observed() == ()


# --- KERNELS_OBSERVE -----------------------------------------------------------------------------


def test_names_are_read_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts once; blanks do not matter."""
    monkeypatch.setenv("KERNELS_OBSERVE", " prometheus,log, ,log")
    assert observed() == ("log", "prometheus")


@pytest.mark.parametrize("value", ["logs", "log,nvtx", "1"])
def test_unknown_names(monkeypatch: pytest.MonkeyPatch, manager: PluginManager, value: str) -> None:
    """An error of ours lists the valid names: a warning, once, and raised in strict mode; the model runs."""
    monkeypatch.setenv("KERNELS_OBSERVE", value)
    with pytest.raises(ArgumentError, match="Write any of log, ranges, prometheus"):
        observed()
    with pytest.warns(KernelsWarning, match="Write any of log, ranges, prometheus") as warned:
        assert call(FastScale).tolist() == [2.0, 2.0]
    assert len(warned) == 1 and [fault.plugin for fault in manager.faults] == ["observe"]
    monkeypatch.setenv("KERNELS_STRICT", "1")
    forget()
    with pytest.raises(PluginError, match="there is no"):
        call(FastScale)


def test_switched_on_by_the_environment_and_found_by_the_entry_point(tmp_path: Path) -> None:
    """In a process of its own, with the installed plugins: all three report a call."""
    code = """
import logging, sys, torch
from prometheus_client import generate_latest
from torch import nn
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(event)s %(origin)s")
@use_kernel_forward_from_hub("Scale")
class Scale(nn.Module):
    def forward(self, x):
        return x
class Fast(nn.Module):
    def forward(self, x):
        return x
register_kernel_mapping({"Scale": {"cpu": Fast}})
with torch.profiler.profile() as profile:
    Scale()(torch.ones(1))
print([event.key for event in profile.key_averages() if "Scale" in event.key])
line = 'kernels_core_calls_total{device="cpu",layer="Scale",origin="__main__.Fast"} 1.0'
print("calls", line in generate_latest().decode())
"""
    environment = {**os.environ, "KERNELS_OBSERVE": "log,ranges,prometheus", "KERNELS_PLUGINS": "mapping,observe"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = run_python("-c", code, environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "kernels_core resolution __main__.Fast",
        "['Scale [__main__.Fast]']",
        "calls True",
    ]


# --- Log -----------------------------------------------------------------------------------------


def test_records_have_fields(isolated_plugins: PluginManager, mapping_plugin: Any, caplog: Any) -> None:
    """A decision is INFO, a refusal is WARNING; both have the fields of their layer."""
    isolated_plugins.register(LogResolutions(), "log")
    caplog.set_level(logging.INFO, "kernels_core")
    with pytest.warns(KernelsWarning):
        call(LocalLayerRepository("/nowhere", layer_name="Scale"), InferenceScale, FastScale, grad=True)
    chosen, *refused = caplog.records
    assert (chosen.name, chosen.levelname, chosen.event) == ("kernels_core", "INFO", "resolution")
    assert (chosen.layer, chosen.device, chosen.mode) == ("Scale", "cpu", "training")
    assert (chosen.origin, chosen.plugin) == (FAST, "mapping")
    assert chosen.getMessage() == f"layer 'Scale' on cpu for training: {FAST}"
    assert [(record.levelname, record.event, record.cause) for record in refused] == [
        ("WARNING", "refusal", "load"),
        ("WARNING", "refusal", "mode"),
    ]
    assert refused[1].candidate == f"{__name__}.InferenceScale" and "has_backward" in refused[1].reason
    assert refused[1].origin == FAST and refused[1].plugin == "mapping"


def test_what_a_kernel_raised_is_in_the_record(isolated_plugins: Any, mapping_plugin: Any, caplog: Any) -> None:
    """The refusal of a kernel that raised, in a call or when it was loaded, has the exception and its lines."""
    isolated_plugins.register(LogResolutions(), "log")
    caplog.set_level(logging.WARNING, "kernels_core")

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("boom")

    with pytest.warns(KernelsWarning):
        call(Fails)
        call(LocalLayerRepository("/nowhere", layer_name="Scale"), InferenceScale, grad=True)
    raised, missing, declared = caplog.records
    assert raised.exc_info[0] is RuntimeError and "in forward" in caplog.text
    assert issubclass(missing.exc_info[0], OSError) and declared.exc_info is None


def test_a_decision_for_every_mode_is_one_record(isolated_plugins: Any, mapping_plugin: Any, caplog: Any) -> None:
    """Where training and inference are served alike, the mode is `every`; warm calls log nothing."""
    isolated_plugins.register(LogResolutions(), "log")
    caplog.set_level(logging.INFO, "kernels_core")
    layer = Scale()
    with use_kernel_mapping({"Scale": {"cpu": FastScale}}):
        for _ in range(3):
            layer(torch.ones(1))
    assert [(record.mode, record.origin) for record in caplog.records] == [("every", FAST)]


# --- Ranges --------------------------------------------------------------------------------------


def test_a_trace_names_layer_and_implementation(isolated_plugins: PluginManager, mapping_plugin: Any) -> None:
    """Kernels and references are ranges in the trace, around their operators; a range ends where a call raises."""
    isolated_plugins.register(ProfileRanges(), "ranges")
    with torch.profiler.profile() as profile:
        call(FastScale)
        call()
        with pytest.raises(TypeError), use_kernel_mapping({}):
            Scale()(torch.ones(1), bad=1)
    names = [event.name for event in profile.events()]
    assert names.count(f"Scale [{FAST}]") == 1 and names.count("Scale [reference]") == 1
    ranged = next(event for event in profile.events() if event.name == f"Scale [{FAST}]")
    assert [child.name for child in ranged.cpu_children] == ["aten::add"]


def test_kernelized_models_have_ranges(isolated_plugins: PluginManager, mapping_plugin: Any) -> None:
    """A frozen kernel of `kernelize` is named as well."""
    isolated_plugins.register(ProfileRanges(), "ranges")
    with use_kernel_mapping({"Scale": {"cpu": FastScale}}):
        model = kernelize(nn.Sequential(Scale()), mode=Mode.INFERENCE, device="cpu")
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.ones(1))
    assert [event.key for event in profile.key_averages() if "Scale" in event.key] == [f"Scale [{FAST}]"]


@pytest.mark.slow
@pytest.mark.parametrize("kernelized", [False, True])
def test_compiled_code_is_left_alone(isolated_plugins: PluginManager, mapping_plugin: Any, kernelized: bool) -> None:
    """Also of a kernelized model: the graph is that of the kernel, and nothing breaks."""
    registry, graphs = CollectorRegistry(), []
    isolated_plugins.register(ProfileRanges(), "ranges")
    isolated_plugins.register(PrometheusCounters(registry), "prometheus")

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with use_kernel_mapping({"Scale": {"cpu": FastScale}}), torch.no_grad():
        model = kernelize(Scale(), mode=Mode.INFERENCE, device="cpu") if kernelized else Scale()
        assert torch.compile(model, backend=backend, fullgraph=True)(torch.ones(1)) == 2
    torch._dynamo.reset()
    (graph,) = graphs
    assert [node.name for node in graph.graph.nodes if node.op.startswith("call")] == ["add"]
    assert not any(count for (name, _), count in samples(registry).items() if "calls" in name)


# --- Prometheus ----------------------------------------------------------------------------------


def test_counters_are_read_back(isolated_plugins: PluginManager, mapping_plugin: Any) -> None:
    """Decisions, refusals, failures and calls, by layer, device and origin."""
    registry = CollectorRegistry()
    isolated_plugins.register(PrometheusCounters(registry), "prometheus")
    absent = LocalLayerRepository("/nowhere/at/all", layer_name="Scale")
    layer, x = Scale(), torch.ones(1)
    with use_kernel_mapping({"Scale": {"cpu": [absent, FastScale]}}), pytest.warns(KernelsWarning):
        for _ in range(3):
            layer(x)
    layer(x)
    assert samples(registry) == {
        ("kernels_core_resolutions_total", FAST): 1,
        ("kernels_core_resolutions_total", "reference"): 1,
        ("kernels_core_refusals_total", repr(absent)): 1,
        ("kernels_core_failures_total", repr(absent)): 1,
        ("kernels_core_calls_total", FAST): 3,
        ("kernels_core_calls_total", "reference"): 1,
    }
    assert 'layer="Scale"' in generate_latest(registry).decode()


def test_a_registry_is_used_twice() -> None:
    """A second plugin on one registry counts on, rather than raising."""
    registry = CollectorRegistry()
    first, second = PrometheusCounters(registry), PrometheusCounters(registry)
    assert first._calls is second._calls


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, manager: PluginManager) -> None:
    """The error names the package to install; by name it is a warning, and the other observers run."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PluginLoadError, match=r"pip install 'kernels-core\[prometheus\]'"):
        PrometheusCounters()
    observe._make.cache_clear()
    monkeypatch.setenv("KERNELS_OBSERVE", "prometheus,ranges")
    with pytest.warns(KernelsWarning, match="not installed"), torch.profiler.profile() as profile:
        call(FastScale)
    assert [event.key for event in profile.key_averages() if "Scale" in event.key] == [f"Scale [{FAST}]"]
