"""Models of the families that `adopt` knows, small and with random weights, and the ways to use them."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels_plugins import adopt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**SIZES, **TOKENS, "num_key_value_heads": 2}
WIDE = {**HEADS, "head_dim": 16}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", HEADS),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", HEADS),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", WIDE),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", HEADS),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**WIDE, "num_local_experts": 4}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**HEADS, "num_local_experts": 4}),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, **TOKENS, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 32, "patch_size": 16}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **TOKENS,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
            **{"d_model": 64, "vocab_size": 100, "num_mel_bins": 8, "decoder_start_token_id": 1},
            **{"max_source_positions": 50, "max_target_positions": 32},
        },
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **{"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "num_heads": 8, "head_dim": 16},
            **{"state_size": 16, "n_groups": 1, "chunk_size": 8},
        },
    ),
    "Zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **HEADS,
            **{"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},
            **{"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
            **{"attention_hidden_size": 128, "attention_head_dim": 32},
        },
    ),
}
Inputs = dict[str, torch.Tensor]


@functools.cache
def made(name: str, device: str = "cpu") -> tuple[Any, Any, Inputs, dict[str, int]]:
    """Return the untouched model, the adopted one, inputs, and how many layers of each name were adopted."""
    cls, config, sizes = MODELS[name]
    if not hasattr(transformers, cls):
        pytest.skip(f"this transformers has no {cls}")
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval().to(device)
    adopted = copy.deepcopy(model)
    counts = Counter(layer.layer_name for layer in adopt(adopted).layers)
    ids = torch.randint(3, 100, (2, 9))
    inputs = {"input_ids": ids}
    if name == "ViT":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 100), "decoder_input_ids": ids}
    return model, adopted, {key: value.to(device) for key, value in inputs.items()}, counts


# --- Features --------------------------------------------------------------------------------------


def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def tokens(model: Any, inputs: Inputs, **options: Any) -> torch.Tensor:
    if not model.can_generate():
        pytest.skip("it generates no tokens")
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def tokens_of_a_static_cache(model: Any, inputs: Inputs) -> torch.Tensor:
    return tokens(model, inputs, cache_implementation="static", disable_compile=True)


def gradients(model: Any, inputs: Inputs) -> list[torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(**inputs).logits.float().pow(2).mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def checkpointing(model: Any, inputs: Inputs) -> list[torch.Tensor | None]:
    model = copy.deepcopy(model).train()  # versions of transformers leave a hook on it
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)  # for dropout
    return gradients(model, inputs)


def _without_cache(model: Any, inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "use_cache": False} if model.can_generate() else dict(inputs)


def compiled(model: Any, inputs: Inputs, backend: str = "aot_eager") -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        # Traced down to operators, as for Inductor, whose code for all models would take ten minutes.
        return torch.compile(model, backend=backend, fullgraph=True)(**_without_cache(model, inputs)).logits


def exported(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        program = torch.export.export(model, (), _without_cache(model, inputs))
        return program.module()(**_without_cache(model, inputs)).logits


FEATURES: dict[str, Callable[[Any, Inputs], Any]] = {
    "logits": logits,
    "tokens": tokens,
    "static cache": tokens_of_a_static_cache,
    "gradients": gradients,
    "checkpointing": checkpointing,
    "compile": compiled,
    "export": exported,
}
