"""Triton kernels that are wrong on purpose: each is caught by the tool that is made for its fault."""

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

import kernels_plugins.oracle.plugin as oracle
from kernels_core import (
    CanaryError,
    KernelsWarning,
    Mode,
    PluginManager,
    quarantined,
    resolve,
    use_kernel_forward_from_hub,
)
from kernels_plugins import bisect, canary, probing, use_kernel_mapping, verify
from kernels_plugins.canary import plugin as canary_plugin
from kernels_plugins.oracle import probe_cache, prober

spec = importlib.util.spec_from_file_location("wrong_kernels", Path(__file__).with_name("wrong_kernels.py"))
assert spec is not None and spec.loader is not None
wrong = importlib.util.module_from_spec(spec)
sys.modules["wrong_kernels"] = wrong
spec.loader.exec_module(wrong)

COLUMNS = 128


@pytest.fixture(autouse=True)
def _scene(
    mapping_plugin: object, isolated_plugins: PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Have the plugins, with nothing known."""
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    for name, plugin in {"canary": canary_plugin, "oracle": oracle, "probe": prober}.items():
        isolated_plugins.register(plugin, name)
    probe_cache._known.clear()
    torch.manual_seed(0)
    yield
    probe_cache._known.clear()


@use_kernel_forward_from_hub("Columns")
class Columns(nn.Module):
    """Each column of its input times a weight."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, COLUMNS, device="cuda", dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def serving(compute: Callable[..., Any], **declarations: bool) -> use_kernel_mapping:
    """Map a kernel."""
    kernel = type("Kernel", (nn.Module,), {"forward": compute, **declarations})
    return use_kernel_mapping({"Columns": {"cuda": kernel}})


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make an input on the GPU that requires grad."""
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


CASES = {
    "biased_in_bfloat16": (lambda: tensor(64, COLUMNS, dtype=torch.bfloat16), "output"),
    "wrong_for_strided": (lambda: tensor(COLUMNS, 64).T, "output"),
    "wrong_gradient": (lambda: tensor(64, COLUMNS), "gradient of.*parameter weight"),
    "mutating": (lambda: tensor(64, COLUMNS) * 1, "input x was changed in place"),
}


@pytest.mark.parametrize("name", CASES)
def test_canary_sees_wrong_kernels(name: str) -> None:
    """A canary sees each on its first call, and says on which device."""
    make, what = CASES[name]
    x = make()
    with serving(getattr(wrong, name)), canary(first=1, every=0, action="raise"):
        with pytest.raises(CanaryError, match=what) as seen:
            Columns(x.dtype)(x)
    assert "on cuda:0" in str(seen.value)


def test_canary_sees_a_stateful_kernel() -> None:
    """Right on its first call, and found on the second."""
    layer, x = Columns(), tensor(64, COLUMNS).detach()
    with serving(wrong.make_stateful()), canary(first=2, action="raise"), torch.no_grad():
        layer(x)
        with pytest.raises(CanaryError, match="call 2"):
            layer(x)


def test_canary_sees_a_kernel_that_turns_wrong_late() -> None:
    """Wrong from the 50th call on: one comparison in ten sees it."""
    layer, x = Columns(), tensor(64, COLUMNS).detach()
    with serving(wrong.make_late(50)), canary(first=1, every=10, action="raise"), torch.no_grad():
        with pytest.raises(CanaryError, match="call 50"):
            for _ in range(60):
                layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_canary_leaves_the_right_one_alone(dtype: torch.dtype) -> None:
    """The kernel that is right passes, for all dtypes, contiguous or not."""
    layer = Columns(dtype)
    with serving(wrong.right), canary(first=10, action="raise"):
        for x in (
            tensor(64, COLUMNS, dtype=dtype),
            tensor(COLUMNS, 64, dtype=dtype).T,
            tensor(0, COLUMNS, dtype=dtype),
        ):
            layer(x).sum().backward()


def test_canary_waits_for_the_device_once() -> None:
    """A call that is compared and found right costs one wait, whatever its tensors are."""
    layer, x = Columns(), tensor(64, COLUMNS)
    with serving(wrong.right), canary(first=10, every=0, action="raise"):
        layer(x)  # what is asked of the device once and for all
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                layer(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "called a synchronizing" in str(wait.message)]) == 1


def test_missing_gradients_are_seen() -> None:
    """A launch that autograd does not know of is refused on the first recorded call, which gets its gradients."""
    layer, x = Columns(), tensor(64, COLUMNS)
    with serving(wrong.missing_gradient), pytest.warns(KernelsWarning, match="loses gradients"):
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.detach().expand(64, COLUMNS))


def test_kernel_that_raises_is_replaced() -> None:
    """Raising on the third call: that call gets the reference's answer, and the kernel is out on that device."""
    calls: list[int] = []

    def third(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")
        return wrong.right(self, x)  # type: ignore[no-any-return]

    layer, x = Columns(), torch.randn(64, COLUMNS, device="cuda")
    with serving(third), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            torch.testing.assert_close(layer(x), x * layer.weight)
    assert len(calls) == 3 and quarantined()[0].device == torch.device("cuda", 0)


@pytest.mark.parametrize("name", [*CASES, "missing_gradient", "make_stateful"])
def test_verify_finds_wrong_kernels(name: str) -> None:
    """From one call in float32, contiguous: also faults in other dtypes and layouts."""
    compute = getattr(wrong, name)
    with serving(compute() if name.startswith("make_") else compute):
        assert not verify(Columns(), torch.randn(64, COLUMNS, device="cuda")).ok


def test_verify_leaves_the_right_one_alone() -> None:
    """In all dtypes, layouts and sizes."""
    with serving(wrong.right):
        report = verify(Columns(), torch.randn(64, COLUMNS, device="cuda"))
    assert report.ok, report


def test_wrong_only_under_compile_is_bisected() -> None:
    """Code that Inductor makes of a kernel is wrong, eager calls are right: bisect names where."""
    model = nn.Sequential(nn.ReLU(), Columns(), nn.Tanh(), nn.Linear(COLUMNS, COLUMNS, device="cuda")).eval()
    x = torch.randn(64, COLUMNS, device="cuda")

    def metric(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(x).abs().mean()

    with serving(wrong.wrong_when_compiled, can_torch_compile=True, has_backward=False):
        assert not bisect(model, metric, tolerance=1e-3).culprits
        result = bisect(torch.compile(model, fullgraph=True), metric, tolerance=1e-3)
    assert [culprit.path for culprit in result.culprits] == ["1"]
    torch._dynamo.reset()


def test_wrong_only_under_compile_is_probed() -> None:
    """A probe on the first call keeps it out of compiled code, and says so."""
    layer, x = Columns(), torch.randn(64, COLUMNS, device="cuda")
    with serving(wrong.wrong_when_compiled, can_torch_compile=True, has_backward=False), probing(), torch.no_grad():
        with pytest.warns(KernelsWarning, match="cannot be traced"):
            torch.testing.assert_close(layer(x), x * layer.weight)
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), x * layer.weight)
        assert resolve(layer, device="cuda", mode=Mode.INFERENCE | Mode.TORCH_COMPILE).is_reference
        assert not resolve(layer, device="cuda", mode=Mode.INFERENCE).is_reference
    torch._dynamo.reset()


def test_nothing_is_compared_while_a_graph_is_captured() -> None:
    """A CUDA graph can be captured inside of a canary, and replays the kernel."""
    layer, x = Columns(), torch.randn(64, COLUMNS, device="cuda")
    with serving(wrong.right), canary(first=1, every=1, action="raise"), torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(out, x * layer.weight)
