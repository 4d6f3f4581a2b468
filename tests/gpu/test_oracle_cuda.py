"""`verify`, the probes and the kit on a GPU, with the Triton kernels of the demo and such that are wrong on purpose."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible, so the Triton kernels cannot run", allow_module_level=True)

import oracle_kernels as made  # noqa: E402

import kernels_plugins.oracle.plugin as oracle  # noqa: E402
from kernels_core import PluginManager  # noqa: E402
from kernels_plugins import check_kernel, use_kernel_mapping, verify  # noqa: E402
from kernels_plugins.demo.block import Block  # noqa: E402
from kernels_plugins.demo.bundle import write_bundle  # noqa: E402
from kernels_plugins.demo.layers import RMSNorm  # noqa: E402
from kernels_plugins.demo.measure import LAYERS  # noqa: E402


@pytest.fixture(autouse=True)
def _plugins(mapping_plugin: object, isolated_plugins: PluginManager) -> None:
    """Run with the plugins `core`, `mapping` and `oracle`."""
    isolated_plugins.register(oracle, "oracle")
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import the Triton kernels of the demo."""
    folder = write_bundle(tmp_path_factory.mktemp("demo") / "hub")
    variant = folder / "kernels-demo" / "llama-layers" / "build" / "torch-cuda"
    name = "oracle_demo_kernels"
    spec = importlib.util.spec_from_file_location(
        name, variant / "__init__.py", submodule_search_locations=[str(variant)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module.layers
    del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_of_the_demo_are_right(kernels: Any, dtype: Any) -> None:
    """Every layer of a Llama block, in every case and dtype, forward and gradients."""
    block = Block(hidden=256, heads=4, inner=512, length=64).to("cuda", dtype)
    mapping = {name: {"cuda": getattr(kernels, name)} for name in LAYERS}
    with use_kernel_mapping(mapping):
        report = verify(block, torch.randn(2, 64, 256, device="cuda", dtype=dtype))
    assert report.ok, report
    assert {row.layer for row in report.rows if row.verdict == "ok"} >= {"RMSNorm", "SiluAndMul", "RotaryEmbedding"}


def test_what_a_triton_kernel_can_do_is_found(kernels: Any) -> None:
    """It traces without graph breaks and can be captured in a CUDA graph."""
    report = check_kernel(kernels.RMSNorm, RMSNorm(256).cuda(), torch.randn(4, 8, 256, device="cuda"))
    assert report.can("compile") and report.can("cuda graph")


@pytest.mark.parametrize(
    "forward",
    [
        made.biased_in_bfloat16,
        made.wrong_for_strides,
        made.wrong_gradient,
        made.missing_gradient,
        made.mutating,
        made.spoiled_at_the_end,
    ],
    ids=lambda forward: forward.__name__,
)
def test_a_wrong_kernel_is_caught(forward: Callable[..., Any]) -> None:
    """As on the CPU."""
    with use_kernel_mapping({"OracleNorm": {"cuda": made.kernel(forward)}}):
        assert not verify(made.Norm().cuda(), torch.randn(4, 8, 64, device="cuda")).ok


@pytest.mark.parametrize("forward", made.RIGHT, ids=lambda forward: forward.__name__)
def test_a_right_kernel_is_not_reported(forward: Callable[..., Any]) -> None:
    """As on the CPU."""
    with use_kernel_mapping({"OracleNorm": {"cuda": made.kernel(forward)}}):
        report = verify(made.Norm().cuda(), torch.randn(4, 8, 64, device="cuda"))
    assert report.ok, report


def test_what_cannot_be_captured_is_told() -> None:
    """A kernel that waits for the device fails in a capture, and the device is well afterwards."""

    def waits(self: Any, x: Any) -> Any:
        return made.norm(x, self.weight) if x.sum().item() != 0.1234 else x

    report = check_kernel(
        made.kernel(waits), made.Norm().cuda(), torch.randn(4, 8, 64, device="cuda"), ignore={"compile", "cuda graph"}
    )
    assert report.can("cuda graph") is False
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_random_numbers_of_the_device_are_kept() -> None:
    """A verification draws none of the GPU's random numbers."""
    x = torch.randn(4, 8, 64, device="cuda")
    state = torch.cuda.get_rng_state()
    with use_kernel_mapping({"OracleNorm": {"cuda": made.kernel(made.fused)}}):
        verify(made.Norm().cuda(), x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
