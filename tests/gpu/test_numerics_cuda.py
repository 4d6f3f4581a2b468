"""Properties of numbers on a GPU: atomic additions, reductions that depend on rows, Triton, and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible", allow_module_level=True)

from norms import ByRows, Norm, Steady, by_rows, norm  # noqa: E402

from kernels_core.replay import Call  # noqa: E402
from kernels_plugins import check_kernel, numerics, use_kernel_mapping  # noqa: E402
from kernels_plugins.numerics.properties import find  # noqa: E402

pytestmark = pytest.mark.usefixtures("numerics_plugin")


def test_atomic_additions_are_not_deterministic() -> None:
    """A sum of many rows into one by atomic additions differs from run to run, in the backward, too."""
    index = torch.zeros(4096, dtype=torch.int64, device="cuda")

    def summed(x: Any) -> Any:
        return torch.zeros(1, x.shape[1], device="cuda").index_add(0, index[: len(x)], x)

    found = find(Call(None, (torch.randn(4096, 256, device="cuda"),)), summed, summed, ["deterministic"])
    assert found["deterministic"].has is False and found["deterministic"].why.startswith("forward: ")


def test_the_kernel_of_the_issue_is_refused_on_a_gpu() -> None:
    """The kit names the number of rows; PyTorch's own norm is deterministic there."""
    inputs = torch.randn(16, 1024, device="cuda"), torch.rand(1024, device="cuda")
    with pytest.raises(AssertionError, match="batch_invariant"):
        check_kernel(by_rows, norm, *inputs, numerics=["batch_invariant"], ignore={"cuda graph"})
    found = find(Call(None, inputs), by_rows, norm, ["batch_invariant", "deterministic"])
    assert "x 65x1024" in found["batch_invariant"].why.replace("argument 1", "x") and found["deterministic"].has


@pytest.mark.filterwarnings("ignore::kernels_core.KernelsWarning")
def test_captured_calls_are_served_by_what_is_known() -> None:
    """In a capture nothing can be tried: the reference serves unless eager calls have proved a kernel."""
    layer, x = Norm(1024).cuda(), torch.randn(128, 1024, device="cuda")

    def captured() -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            norm(x, layer.weight)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        torch.cuda.synchronize()
        return y

    expected = norm(x, layer.weight.detach())
    with use_kernel_mapping({"NumericsNorm": {"cuda": [ByRows, Steady]}}), numerics("batch_invariant"):
        with torch.no_grad():
            assert torch.equal(captured(), expected)  # not by `ByRows`, of which nothing is known
            assert torch.equal(layer(x), expected)
            assert torch.equal(captured(), expected)


@pytest.mark.parametrize("name", ["RMSNorm", "RMSNormOffset", "SiluAndMul", "rotary_pos_emb"])
def test_the_kernels_of_the_pack_triton_have_all_properties(name: str) -> None:
    """Also one that computes no gradients of its angles, on inputs of which none requires grad."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernels_plugins.adoption.shipped import RULES
    from kernels_plugins.packs.triton.layers import KERNELS

    reference: Any = next(rule.oracle for rule in RULES if rule.layer_name == name)
    kernel, module = KERNELS[name], None
    inputs = [torch.randn(2, 8, 256, device="cuda", dtype=torch.bfloat16)]
    if name.startswith("RMS"):
        module = torch.nn.RMSNorm(256, device="cuda", dtype=torch.bfloat16)
        module.variance_epsilon = 1e-6
    elif name.startswith("rotary"):
        q, angles = torch.randn(2, 4, 8, 64, device="cuda"), torch.randn(2, 8, 64, device="cuda")
        inputs = [q, q[:, :2].clone(), angles.cos(), angles.sin()]
    forward: Any = getattr(kernel, "forward", kernel)
    if name == "SiluAndMul":
        module = torch.nn.Module()
    found = find(Call(module, tuple(inputs)), forward, reference, ["deterministic", "batch_invariant"])
    assert {name: finding.has for name, finding in found.items()} == {"deterministic": True, "batch_invariant": True}
