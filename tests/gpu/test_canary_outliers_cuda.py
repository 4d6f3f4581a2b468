"""Outliers of a canary on a real GPU: found at the second, without a wait in usual calls. Skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kernels_core import CanaryError, PluginManager, use_kernel_forward_from_hub
from kernels_plugins import canary, use_kernel_mapping
from kernels_plugins.canary import outliers
from kernels_plugins.canary import plugin as canary_plugin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _canary(mapping_plugin: object, isolated_plugins: PluginManager) -> None:
    isolated_plugins.register(canary_plugin, "canary")
    torch.manual_seed(0)


@use_kernel_forward_from_hub("GpuTwice")
class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class WrongForLarge(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.abs().amax() < 1e3, x + x, x)


class WrongForNan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.isnan().any(), x, x + x)


@pytest.fixture(params=["Triton", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let Triton's kernel read inputs, or operators of PyTorch, as where there is no Triton."""
    reader = outliers._reader(torch.device("cuda", torch.cuda.current_device()))
    assert reader._kernel is not None, "Triton's kernel was not tried, or has failed"
    if request.param == "PyTorch":
        monkeypatch.setattr(reader, "_kernel", None)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("between", [0, 5])
@pytest.mark.parametrize(("kernel", "value"), [(WrongForLarge, 1e4), (WrongForNan, float("nan"))])
@pytest.mark.usefixtures("way")
def test_the_second_outlier_is_compared(kernel: Any, value: float, between: int, dtype: torch.dtype) -> None:
    """One number that stands out, usual calls between or not; the message says which."""
    usual = torch.rand(64, 128, device="cuda", dtype=dtype) + 1
    outlier = usual.clone()
    outlier[17, 3] = value
    with use_kernel_mapping({"GpuTwice": {"cuda": kernel}}), canary(first=1, every=0, action="raise"), torch.no_grad():
        layer = Twice()
        for x in (usual,) * 20 + (outlier,) + (usual,) * between:
            layer(x)
        torch.cuda.synchronize()
        with pytest.raises(CanaryError, match="compared because tensor 1 of its inputs"):
            layer(outlier)


@pytest.mark.parametrize("value", [1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("recorded", [False, True])
def test_one_number_in_33_million_is_found(value: float, recorded: bool) -> None:
    """Anywhere in a large tensor, another place each time, between usual calls; also where autograd records."""
    kernel = WrongForNan if value != value else WrongForLarge
    places = torch.Generator().manual_seed(7)
    weight = torch.ones((), device="cuda", requires_grad=recorded)
    usual = torch.rand(8192, 4096, device="cuda", dtype=torch.bfloat16) + 1
    for _ in range(5):
        with use_kernel_mapping({"GpuTwice": {"cuda": kernel}}), canary(first=1, every=0, action="raise"):
            layer = Twice()
            for _ in range(5):
                layer(usual * weight)
                torch.cuda.synchronize()
            with pytest.raises(CanaryError, match="compared because tensor 1 of its inputs"):
                for _ in range(2):
                    x = usual.clone()
                    x.view(-1)[int(torch.randint(x.numel(), (), generator=places))] = value
                    layer(x * weight)
                    torch.cuda.synchronize()


def test_an_input_of_two_kernels_is_read_once() -> None:
    """A tensor that autograd has recorded is read for one kernel, known to the next, and read again once changed."""
    weight = torch.ones(1024, device="cuda", requires_grad=True)
    right = type("Right", (nn.Module,), {"forward": lambda self, x: x + x})
    other = use_kernel_forward_from_hub("GpuOther")(type("Other", (Twice,), {"forward": Twice.forward}))
    mapping = {name: {"cuda": right} for name in ("GpuTwice", "GpuOther")}
    with use_kernel_mapping(mapping), canary(first=1, every=0, action="raise"):
        layers = Twice(), other()
        for _ in range(3):
            for layer in layers:
                layer(weight * 2)
        x = weight * 3
        assert reads(lambda: [layer(x) for layer in layers]) == 1
        assert reads(lambda: [layer(weight) for layer in layers]) == 2
        with torch.no_grad():
            x.add_(1)
        assert reads(lambda: [layer(x) for layer in layers]) == 1


def reads(call: Callable[[], object]) -> int:
    """Return how many tensors the GPU reads meanwhile."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.key.startswith("_largest_kernel"))


def test_usual_calls_do_not_wait() -> None:
    """Calls return while the GPU is busy with earlier work; nothing reads a tensor, also under autocast."""
    x = torch.rand(64, 128, device="cuda", requires_grad=True)
    large = torch.rand(8192, 8192, device="cuda")
    with use_kernel_mapping({"GpuTwice": {"cuda": type("Right", (nn.Module,), {"forward": lambda self, x: x + x})}}):
        with canary(first=2, every=0, action="raise"), warnings.catch_warnings(), torch.autocast("cuda"):
            layer = Twice()
            for _ in range(4):
                layer(x).sum().backward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(60):  # about a second
                    large = large @ large
                begun = torch.cuda.Event()
                begun.record()
                for _ in range(20):
                    layer(x).sum().backward()
                assert not begun.query()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_is_left_alone() -> None:
    """No magnitude is computed or read while a graph is captured, and the graph replays."""
    x = torch.rand(64, 128, device="cuda")
    right = type("Right", (nn.Module,), {"forward": lambda self, x: x + x})
    with use_kernel_mapping({"GpuTwice": {"cuda": right}}), canary(first=1, every=0, action="raise"), torch.no_grad():
        layer = Twice()
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, x * 2)
