"""Bisect and observers on a real GPU: CUDA random numbers, threads of autograd, Triton, NVTX. Skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels_core import Mode, kernelize, plugin_manager, use_kernel_forward_from_hub
from kernels_plugins import ProfileRanges, bisect, register_kernel_mapping, use_kernel_mapping

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

COUNT = 24
WRONG = (5, 18)


@triton.jit
def _scale(x_ptr, out_ptr, scale, bias, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + place, mask=place < count)
    tl.store(out_ptr + place, x * scale + bias, mask=place < count)


@use_kernel_forward_from_hub("GpuScale")
class Scale(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


class TritonScale(nn.Module):
    """In Triton; wrong in some places, in bfloat16 alone."""

    has_backward = False
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        bias = 0.5 if self.wrong and x.dtype is torch.bfloat16 else 0.0
        _scale[(triton.cdiv(x.numel(), 256),)](x, out, 0.5, bias, x.numel(), block=256)
        return out


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


class WrongGradient(nn.Module):
    """Its gradient is wrong in some places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Straight.apply(x, 0.75 if self.wrong else 0.5)


class Block(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = nn.Linear(32, 32), Scale(wrong), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.scale(self.linear(x)))


def make(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(layer in WRONG) for layer in range(COUNT))).to("cuda", dtype)


def outputs(model: nn.Module) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(torch.randn(16, 32, device="cuda", dtype=dtype)).float().mean()


def found(result: Any) -> list[str]:
    return [culprit.path for culprit in result.culprits]


EXPECTED = [f"{place}.scale" for place in WRONG]


@pytest.mark.parametrize("kernelized", [False, True])
def test_wrong_in_bfloat16_alone(kernelized: bool) -> None:
    """The places are found, with dropout and random inputs: random numbers of the GPU start alike, and are put back."""
    before = torch.cuda.get_rng_state()
    with use_kernel_mapping({"GpuScale": {"cuda": TritonScale}}):
        for dtype, places in ((torch.float32, []), (torch.bfloat16, EXPECTED)):
            model = make(dtype)
            torch.cuda.set_rng_state(before)
            if kernelized:
                kernelize(model, mode=Mode.INFERENCE)
                model.eval()
            result = bisect(model, outputs, tolerance=1e-3)
            assert found(result) == places
            assert result.evaluations <= len(places) * 9 + 5
            assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_that_are_made_in_threads_of_autograd(reentrant: bool) -> None:
    """With checkpoints, forwards run again in the backward, in another thread: they are switched there, too."""
    model = make()

    def gradient(model: nn.Module) -> torch.Tensor:
        x = torch.randn(16, 32, device="cuda", requires_grad=True)
        hidden = x
        for block in model:
            hidden = checkpoint(block, hidden, use_reentrant=reentrant)
        hidden.sum().backward()
        return model[0].linear.weight.grad.norm()

    # For the process: threads of autograd do not see the scopes of the thread that calls backward.
    register_kernel_mapping({"GpuScale": {"cuda": WrongGradient}})
    try:
        result = bisect(model, gradient, tolerance=0.0, relative=1e-3)
    finally:
        register_kernel_mapping({}, inherit_mapping=False)
    assert found(result) == EXPECTED
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_by_inductor() -> None:
    """A compiled model: the code that Inductor made of the kernel is switched by compiling again."""
    model = make(torch.bfloat16)[4:8].eval()
    with use_kernel_mapping({"GpuScale": {"cuda": TritonScale}}):
        result = bisect(torch.compile(model, fullgraph=True), outputs, tolerance=1e-2)
    assert found(result) == ["5.scale"]
    torch._dynamo.reset()


def test_ranges_are_pushed_to_nvtx_and_to_the_profiler() -> None:
    """The range of a call on the GPU is in the trace, and around it an NVTX range is balanced, also where it raises."""
    plugin_manager().register(ProfileRanges(), "ranges")
    model = Scale(False)
    try:
        with use_kernel_mapping({"GpuScale": {"cuda": TritonScale}}), torch.profiler.profile() as profile:
            model(torch.ones(4, device="cuda"))
            with pytest.raises(TypeError):
                model(torch.ones(4, device="cuda"), nothing=1)
            depth = torch.cuda.nvtx.range_push("depth")
            torch.cuda.nvtx.range_pop()
    finally:
        plugin_manager().unregister("ranges")
    assert depth <= 0  # negative: no tool listens
    # One range of the CPU, and with some versions one of the GPU beside it.
    assert {event.key for event in profile.key_averages() if "GpuScale" in event.key} == {
        f"GpuScale [{__name__}.TritonScale]"
    }
