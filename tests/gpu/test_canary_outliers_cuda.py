"""Outliers of a canary on a real GPU: found one call late, without a wait in usual calls. Skipped without one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kernels_core import CanaryError, PluginManager, use_kernel_forward_from_hub
from kernels_plugins import canary, use_kernel_mapping
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("between", [0, 5])
@pytest.mark.parametrize(("kernel", "value"), [(WrongForLarge, 1e4), (WrongForNan, float("nan"))])
def test_the_second_outlier_is_compared(kernel: Any, value: float, between: int, dtype: torch.dtype) -> None:
    """One number that stands out, usual calls between or not; the message says which."""
    usual = torch.rand(64, 128, device="cuda", dtype=dtype) + 1
    outlier = usual.clone()
    outlier[17, 3] = value
    with use_kernel_mapping({"GpuTwice": {"cuda": kernel}}), canary(first=1, every=0, action="raise"), torch.no_grad():
        layer = Twice()
        for x in (usual,) * 20 + (outlier,) + (usual,) * between:
            layer(x)
        with pytest.raises(CanaryError, match="compared because tensor 1 of its inputs"):
            layer(outlier)


def test_usual_calls_do_not_wait() -> None:
    """Usual calls wait for an event at most, of the call before; nothing reads a tensor, also under autocast."""
    x = torch.rand(64, 128, device="cuda", requires_grad=True)
    with use_kernel_mapping({"GpuTwice": {"cuda": type("Right", (nn.Module,), {"forward": lambda self, x: x + x})}}):
        with canary(first=2, every=0, action="raise"), warnings.catch_warnings(), torch.autocast("cuda"):
            layer = Twice()
            for _ in range(4):
                layer(x)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(10):
                    layer(x).sum().backward()
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
