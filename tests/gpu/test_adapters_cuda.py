"""`opaque` and `reference_backward` with a Triton kernel that Dynamo cannot trace. Skipped where there is no GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from kernels_core import decorated_layer, quarantined, use_kernel_forward_from_hub
from kernels_plugins import opaque, reference_backward, use_kernel_mapping

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs Triton")
import triton.language as tl  # noqa: E402

SIZE = 256


@triton.jit
def _norm(x, weight, y, size: tl.constexpr, eps):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    columns = tl.arange(0, size)
    value = tl.load(x + row * size + columns).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    result = value * scale * tl.load(weight + columns).to(tl.float32)
    tl.store(y + row * size + columns, result.to(y.dtype.element_ty))


LAUNCH = {"norm": _norm}
"""A launcher that is looked up at run time, through a function that Dynamo must not trace."""


@torch._dynamo.disable
def launch(name: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = torch.empty_like(x)
    LAUNCH[name][(x.numel() // x.shape[-1],)](x, weight, y, x.shape[-1], eps)
    return y


@use_kernel_forward_from_hub("GpuNorm")
class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class TritonNorm(nn.Module):
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return launch("norm", x.contiguous(), self.weight, self.eps)


class InPlaceNorm(nn.Module):
    has_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        LAUNCH["norm"][(x.numel() // x.shape[-1],)](x, self.weight, x, x.shape[-1], self.eps)
        return x.clone()


SOURCES = {"opaque": opaque(TritonNorm), "both": opaque(reference_backward(TritonNorm))}
EVERY = pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Compile anew."""
    torch._dynamo.reset()


def serving(source: Any) -> Any:
    return use_kernel_mapping({"GpuNorm": {"cuda": source}})


def reference(layer: Any, x: torch.Tensor) -> Any:
    return decorated_layer(layer).reference(layer, x)


def assert_like_reference(run: Any, layer: Any, x: torch.Tensor) -> None:
    """Compare outputs and gradients."""
    output, expected = run(x), reference(layer, x)
    torch.testing.assert_close(output, expected)
    if output.requires_grad:
        weights = torch.linspace(1, 2, output.numel(), device="cuda").view_as(output)
        mine, right = (torch.autograd.grad((y * weights).sum(), (x, layer.weight)) for y in (output, expected))
        torch.testing.assert_close(mine, right)


def example(rows: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, SIZE, device="cuda", dtype=dtype, requires_grad=True)


@EVERY
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_into_one_graph_with_right_gradients(source: Any, backend: str, dtype: torch.dtype) -> None:
    """One graph for all shapes of a dynamic dimension, with outputs and gradients of the reference."""
    layer = Norm().cuda()
    counter = CompileCounterWithBackend(backend)
    with serving(source):
        run = torch.compile(layer, backend=counter, fullgraph=True)
        for rows in (8, 3, 40):
            x = example(rows, dtype)
            torch._dynamo.mark_dynamic(x, 0)
            assert_like_reference(run, layer, x)
    assert counter.frame_count == 1
    assert any("kernels_opaque" in str(node.target) for node in counter.graphs[0].graph.nodes)
    assert not quarantined()


def test_without_opaque_it_breaks_the_graph() -> None:
    """Declared traceable, this kernel fails under fullgraph."""
    kernel = type("Lies", (TritonNorm,), {"can_torch_compile": True})
    with serving(kernel), pytest.raises(torch._dynamo.exc.Unsupported), torch.no_grad():
        torch.compile(Norm().cuda(), backend="eager", fullgraph=True)(example())


@pytest.mark.parametrize("source", [reference_backward(TritonNorm), *SOURCES.values()], ids=["backward", *SOURCES])
def test_eager_training(source: Any) -> None:
    """The kernel without a backward serves training, also under activation checkpointing."""
    layer, x = Norm().cuda(), example()
    with serving(source):
        assert_like_reference(layer, layer, x)
        assert_like_reference(layer, layer, x)
        # Autograd's own thread, which starts outside of the scope, enters it again.
        y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), serving(source)))
        (gradient,) = torch.autograd.grad(y.sum(), x)
    (right,) = torch.autograd.grad(reference(layer, x).sum(), x)
    torch.testing.assert_close(gradient, right)
    assert not quarantined()


def test_random_numbers_of_the_device() -> None:
    """A reference that draws random numbers on the GPU draws the same again backward."""

    @use_kernel_forward_from_hub("GpuDrop")
    def drop(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) * 1.0

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) * 1.0

    kernel.has_backward = False  # type: ignore[attr-defined]
    with use_kernel_mapping({"GpuDrop": {"cuda": reference_backward(kernel)}}):
        for _ in range(3):
            x = torch.ones(4096, device="cuda", requires_grad=True)
            y = drop(x)
            torch.rand(3, device="cuda")
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(gradient, y.detach())


def test_cuda_graphs() -> None:
    """With mode="reduce-overhead", the operator is captured and replayed."""
    layer = Norm().cuda()
    with serving(opaque(TritonNorm)), torch.no_grad():
        run = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for _ in range(5):
            x = example().detach()
            torch.testing.assert_close(run(x).clone(), reference(layer, x))


def test_a_kernel_that_writes_to_its_input_is_taken_out() -> None:
    """A Triton kernel changes memory behind PyTorch's back: noticed on copies, on the first run."""
    layer, x = Norm().cuda(), example().detach()
    before = x.clone()
    with serving(opaque(InPlaceNorm)), torch.no_grad():
        output = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output, reference(layer, before))
    assert torch.equal(x, before)
    assert "changes input x in place" in quarantined()[0].reason


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Under autocast, dtypes and numbers are those of the reference."""

    @use_kernel_forward_from_hub("GpuLinear")
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(SIZE, SIZE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch._dynamo.disable(torch.matmul)(x, self.weight)  # type: ignore[no-any-return]

    layer, x = Linear().cuda(), example()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16) if inside else contextlib.nullcontext():
            return layer(x)  # type: ignore[no-any-return]

    with use_kernel_mapping({"GpuLinear": {"cuda": opaque(Kernel)}}):
        run = torch.compile(step, backend="inductor", fullgraph=True)
        with contextlib.nullcontext() if inside else torch.autocast("cuda", torch.bfloat16):
            output = run(x)
    with torch.autocast("cuda", torch.bfloat16):
        expected = reference(layer, x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected)
    assert not quarantined()
