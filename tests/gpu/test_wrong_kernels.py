"""Triton kernels that are wrong on purpose: each is caught by what should catch it."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible, so Triton kernels cannot run", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed, so its kernels cannot be compiled", allow_module_level=True)

from kernels_core import CanaryError, KernelsWarning, PluginManager, quarantined, release, use_kernel_forward_from_hub
from kernels_plugins import canary, use_kernel_mapping
from kernels_plugins.canary import plugin as canary_plugin

spec = importlib.util.spec_from_file_location("wrong_kernels", Path(__file__).with_name("wrong_kernels.py"))
assert spec is not None and spec.loader is not None
wrong = importlib.util.module_from_spec(spec)
sys.modules["wrong_kernels"] = wrong
spec.loader.exec_module(wrong)


@pytest.fixture(autouse=True)
def _canary(mapping_plugin: object, isolated_plugins: PluginManager) -> Iterator[None]:
    """Have the plugin, and leave nothing in quarantine."""
    isolated_plugins.register(canary_plugin, "canary")
    yield
    release()


@use_kernel_forward_from_hub("Twice")
class Twice(nn.Module):
    """Twice its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def kernel_of(compute: Callable[..., Any]) -> use_kernel_mapping:
    """Map a kernel."""
    return use_kernel_mapping({"Twice": {"cuda": type("Kernel", (nn.Module,), {"forward": compute})}})


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make an input on the GPU that requires grad."""
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


CASES = {
    "biased_in_bfloat16": (lambda: tensor(64, 128, dtype=torch.bfloat16), "output"),
    "wrong_for_strided": (lambda: tensor(64, 128).T, "output"),
    "wrong_gradient": (lambda: tensor(64, 128), "gradient of.*input x"),
    "mutating": (lambda: tensor(64, 128) * 1, "input x was changed in place"),
}


@pytest.mark.parametrize("name", CASES)
def test_canary_sees_wrong_triton_kernels(name: str) -> None:
    """A canary sees each on its first call, and says on which device."""
    make, what = CASES[name]
    with kernel_of(getattr(wrong, name)), canary(first=1, every=0, action="raise"):
        with pytest.raises(CanaryError, match=what) as seen:
            Twice()(make())
    assert "on cuda:0" in str(seen.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_canary_leaves_the_right_one_alone(dtype: torch.dtype) -> None:
    """The kernel that is right passes, for all dtypes, contiguous or not."""
    with kernel_of(wrong.right), canary(first=10, action="raise"):
        for x in (tensor(64, 128, dtype=dtype), tensor(64, 128, dtype=dtype).T, tensor(0, 128, dtype=dtype)):
            Twice()(x).sum().backward()


def test_missing_gradient_is_seen() -> None:
    """A launch that autograd does not know of is refused on the first recorded call, which gets its gradient."""
    x = tensor(64, 128)
    with kernel_of(wrong.missing_gradient), pytest.warns(KernelsWarning, match="loses gradients"):
        Twice()(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 2).all())


def test_kernel_that_raises_is_replaced() -> None:
    """Raising on the third call: that call gets the reference's answer, and the kernel is out on that device."""
    calls: list[int] = []

    def third(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return wrong.right(self, x)  # type: ignore[no-any-return]

    x = torch.randn(64, 128, device="cuda")
    with kernel_of(third), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            torch.testing.assert_close(Twice()(x), x * 2)
    assert len(calls) == 3 and quarantined()[0].device == torch.device("cuda", 0)


def test_kernel_that_turns_wrong_late_is_seen() -> None:
    """Wrong from the 50th call on: one comparison in ten sees it."""
    calls: list[int] = []

    def late(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return wrong.launch(x, 2.0, 0.5 * (len(calls) >= 50))  # type: ignore[no-any-return]

    x = torch.randn(64, 128, device="cuda")
    with kernel_of(late), canary(first=1, every=10, action="raise"), pytest.raises(CanaryError, match="call 50"):
        for _ in range(60):
            Twice()(x)


def test_nothing_is_compared_while_a_graph_is_captured() -> None:
    """A CUDA graph can be captured inside of a canary, and replays the kernel."""
    layer, x = Twice(), torch.randn(64, 128, device="cuda")
    with kernel_of(wrong.right), canary(first=1, every=1, action="raise"), torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(out, x * 2)
