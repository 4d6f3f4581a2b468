"""The pack `liger` on a GPU: numbers, gradients, receipts, and the calls that it leaves to others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import torch.utils.checkpoint  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from kernels_core import Mode, checkpoint_scopes, kernelize, receipt  # noqa: E402
from kernels_plugins import adopt, use_kernel_mapping  # noqa: E402

WIDTH = 256


class LlamaRMSNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(WIDTH) / 4)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Any) -> Any:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Any) -> Any:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1 + self.weight.to(wide.dtype))).to(hidden_states.dtype)


class SwiMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class GeMLP(SwiMLP):
    def forward(self, x: Any) -> Any:
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class PackedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * functional.silu(gate))


LAYERS = {
    "RMSNorm": LlamaRMSNorm,
    "RMSNormOffset": GemmaRMSNorm,
    "SwiGLUMLP": SwiMLP,
    "GeGLUTanhMLP": GeMLP,
    "PackedSwiGLUMLP": PackedMLP,
}
MAPPING: Any = dict.fromkeys(LAYERS, "pack:liger")


def run(layer: Any, x: Any, gradient: Any) -> list[Any]:
    """Return the output, and the gradients of the input and of each parameter."""
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, (x, *layer.parameters()), gradient)]


@pytest.mark.parametrize("shape", [(2, 33, WIDTH), (1, 1, WIDTH)])
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    """In bfloat16, output and gradients are about as near to those in float32 as the layer's own are."""
    torch.manual_seed(0)
    exact = LAYERS[name]().cuda()
    model = nn.Sequential(copy.deepcopy(exact).bfloat16())
    exact.load_state_dict({key: value.float() for key, value in model[0].state_dict().items()})
    x, gradient = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wanted, own = run(exact, x.float(), gradient.float()), run(model[0], x, gradient)
    with adopt(model) as adopted, use_kernel_mapping(MAPPING):
        assert [layer.layer_name for layer in adopted.layers] == [name]
        found = run(model[0], x, gradient)
        (row,) = adopted.receipt(device="cuda", mode=Mode.TRAINING).rows
        assert row.origin.startswith("liger-kernel ")
    for kernel, reference, value in zip(found, own, wanted, strict=True):
        assert kernel.dtype is torch.bfloat16 and kernel.shape == value.shape
        if value.numel():
            bound = 2 * (reference.float() - value).abs().max() + 2e-2 * value.abs().max()
            assert (kernel.float() - value).abs().max() <= bound


def test_calls_that_are_left_to_others() -> None:
    """float64, a weight of another dtype and compiled code run the reference."""
    torch.manual_seed(0)
    model = nn.Sequential(LlamaRMSNorm(), SwiMLP()).cuda()
    wide = copy.deepcopy(model).double()
    x = torch.randn(4, WIDTH, device="cuda")
    with torch.no_grad():
        wanted, exact, mixed = model(x), wide(x.double()), model[0](x.bfloat16())
        with adopt(model), adopt(wide), use_kernel_mapping(MAPPING):
            torch.testing.assert_close(wide(x.double()), exact, rtol=0, atol=0)
            torch.testing.assert_close(model[0](x.bfloat16()), mixed)
            compiled = torch.compile(model, fullgraph=True)(x)
            torch.testing.assert_close(compiled, wanted, rtol=1e-3, atol=1e-3)


def test_backwards_that_liger_gets_wrong() -> None:
    """A second backward of an MLP, and second derivatives, raise; checkpointing is right."""
    torch.manual_seed(0)
    model = nn.Sequential(SwiMLP()).cuda()
    x = torch.randn(4, WIDTH, device="cuda", requires_grad=True)
    wanted = torch.autograd.grad(model(x).sum(), x)
    with adopt(model), use_kernel_mapping(MAPPING):
        output = model(x).sum()
        torch.testing.assert_close(torch.autograd.grad(output, x, retain_graph=True), wanted, rtol=1e-3, atol=1e-3)
        with pytest.raises(RuntimeError, match="a second backward"):
            torch.autograd.grad(output, x)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)
        for options in ({"use_reentrant": True}, {"use_reentrant": False, "context_fn": checkpoint_scopes}):
            output = torch.utils.checkpoint.checkpoint(model, x, **options).sum()
            x.grad = None
            output.backward()
            torch.testing.assert_close((x.grad,), wanted, rtol=1e-3, atol=1e-3)


def test_kernelized_and_captured() -> None:
    """A kernelized model keeps the kernels without the mapping, and runs in a CUDA graph."""
    torch.manual_seed(0)
    model = nn.Sequential(LlamaRMSNorm(), SwiMLP()).cuda().bfloat16()
    x = torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        adopt(model)
        with use_kernel_mapping(MAPPING):
            kernelize(model, mode=Mode.INFERENCE, device="cuda")
        assert all(row.origin.startswith("liger-kernel ") for row in receipt(model).rows)
        for _ in range(2):
            model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        graph.replay()
    torch.testing.assert_close(captured, wanted, rtol=0.05, atol=0.05)


def test_inductor() -> None:
    """The compiled reference serves eager calls on a GPU, with its gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(LlamaRMSNorm()).cuda()
    x, gradient = (torch.randn(8, WIDTH, device="cuda") for _ in range(2))
    wanted = run(model[0], x, gradient)
    with adopt(model) as adopted, use_kernel_mapping({"RMSNorm": {"cuda": "pack:inductor"}}):
        torch.testing.assert_close(run(model[0], x, gradient), wanted, rtol=1e-3, atol=1e-3)
        assert "inductor" in str(adopted.receipt(device="cuda", mode=Mode.TRAINING))
