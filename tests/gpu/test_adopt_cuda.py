"""Adopted models on a GPU: the pack of PyTorch's operators serves them, and they compute what they computed."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kernels_core import Mode, kernelize  # noqa: E402
from kernels_plugins import adopt  # noqa: E402

CONFIGS = {
    "LlamaForCausalLM": "LlamaConfig",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "Qwen3ForCausalLM": "Qwen3Config",
}


def make(cls: str) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, CONFIGS[cls])(**sizes, num_hidden_layers=2, vocab_size=128, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return getattr(transformers, cls)(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("cls", CONFIGS)
def test_logits_and_gradients(cls: str) -> None:
    """In bfloat16, adopted, an error against float32 is no larger than that of the untouched model, about."""
    model = make(cls)
    ids = torch.randint(1, 128, (2, 33), device="cuda")
    plain = model(ids).logits
    wide = make(cls).float()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    exact = wide(ids).logits
    with adopt(model) as adopted:
        assert {row.plugin for row in adopted.receipt().rows if "Norm" in row.layer_name} == {"torch"}
        found = model(ids).logits
        found.float().pow(2).mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    bound = 2 * (plain.float() - exact).abs().max() + 1e-3
    assert (found.float() - exact).abs().max() <= bound


def test_captured_and_compiled() -> None:
    """A kernelized model is captured in a CUDA graph, and an adopted one compiled in one graph."""
    model = make("LlamaForCausalLM")
    ids = torch.randint(1, 128, (1, 16), device="cuda")
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        adopt(model)
        compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, wanted, rtol=0.05, atol=0.05)
        kernelize(model, mode=Mode.INFERENCE, device="cuda")
        for _ in range(2):
            model(ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(ids, use_cache=False).logits
        graph.replay()
    torch.testing.assert_close(captured, wanted, rtol=0.05, atol=0.05)
