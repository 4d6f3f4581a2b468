"""Adopted models on a GPU: the pack of PyTorch's operators serves them, and they compute what they computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from kernels_core import Mode, forget, kernelize  # noqa: E402
from kernels_plugins import adopt, use_kernel_mapping  # noqa: E402
from kernels_plugins.adoption import shipped_parents  # noqa: E402
from kernels_plugins.packs.linear_cross_entropy import linear_cross_entropy  # noqa: E402

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


def test_a_training_step_without_logits() -> None:
    """The pack's chunked loss gives the loss and gradients of the model's own, and returns no logits."""
    model = make("LlamaForCausalLM").train()
    ids = torch.randint(1, 128, (2, 33), device="cuda")

    def step() -> Any:
        model.zero_grad()
        output = model(ids, labels=ids.masked_fill(ids < 20, -100), num_items_in_batch=torch.tensor(40))
        output.loss.backward()
        return output, [parameter.grad.clone() for parameter in model.parameters()]

    plain, slopes = step()
    with adopt(model), use_kernel_mapping({"linear_cross_entropy": {"cuda": "pack:torch"}}):
        output, found = step()
    assert plain.logits is not None and output.logits is None
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, slopes, rtol=0.05, atol=0.01)


def test_the_memory_of_the_loss_in_chunks() -> None:
    """At 4,096 x 2,048 x 64,000 in bfloat16, the loss takes less than a third of the memory of all logits."""
    peaks = []
    for loss in (shipped_parents.linear_cross_entropy, linear_cross_entropy):
        hidden = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(64000, 2048, device="cuda", dtype=torch.bfloat16).mul_(2048**-0.5).requires_grad_()
        labels = torch.randint(0, 64000, (4096,), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(hidden, weight, None, labels, None, -100).backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del hidden, weight, labels
    print(f"all logits {peaks[0] / 2**20:,.0f} MiB, in chunks {peaks[1] / 2**20:,.0f} MiB")
    assert peaks[1] < peaks[0] / 3


def test_a_kernel_for_the_sum_and_norm_of_blocks() -> None:
    """A kernel serves blocks on a GPU, eager, compiled and with checkpointing."""
    model = make("LlamaForCausalLM")
    ids = torch.randint(1, 128, (2, 33), device="cuda")
    wanted = model(ids, use_cache=False).logits

    def add_and_normalise(x: Any, residual: Any, weight: Any, epsilon: float, norm: Any) -> Any:
        summed = residual + x
        return torch.nn.functional.rms_norm(summed, weight.shape, weight, epsilon), summed

    add_and_normalise.can_torch_compile = True  # type: ignore[attr-defined]
    with adopt(model) as adopted, use_kernel_mapping({"add_rms_norm": {"cuda": add_and_normalise}}):
        (row, *_) = (row for row in adopted.receipt().rows if row.layer_name == "add_rms_norm")
        assert row.bypasses == ("post_attention_layernorm",)
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=0.05, atol=0.05)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, rtol=0.05, atol=0.05)
        model.train().gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_ten_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a GPU, too: adopted, measured and chosen, with a receipt that says by how much each layer wins."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python needs=transformers\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    for on_cpu in (".eval()", "torch.arange(128)[None]", "torch.tensor([[1]])"):
        assert on_cpu in program
        program = program.replace(on_cpu, f"{on_cpu}.cuda()")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "ten_lines"}
    exec(program.replace('use_choice("', 'opened = use_choice("'), names)
    names["opened"].close()
    forget()
    shown = capsys.readouterr().out
    assert re.search(r"model\.norm +RMSNorm +cuda\S* +inference +\S+", shown), shown
    assert re.search(r"by kernels\.choice\.json: 1(-\d+)? rows? of 256 float32: ", shown), shown
