"""A model of transformers, plain and adopted: prefill, one step of decoding, and a training step."""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import Row

from kernels_plugins import adopt, use_choice, use_kernel_mapping

SIZES: dict[str, dict[str, int]] = {
    "cpu": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32},
}
PROMPT = {"cpu": 256, "cuda": 4096}
ROUNDS = {"cpu": 8, "cuda": 12}
CACHED = 64
LIGER = {key: {"cuda": "pack:liger"} for key in ("RMSNorm", "SwiGLUMLP")}
TRITON = ("RMSNorm", "add_rms_norm", "SwiGLUMLP", "rotary_pos_emb", "linear_cross_entropy")

Subjects = dict[str, Mapping[str, Any] | None]
"""Mappings by name; None for the model as it is, not adopted."""


def run() -> Iterator[Row]:
    """Measure on the CPU in float32 and, where there is one, on a CUDA device in bfloat16."""
    if importlib.util.find_spec("transformers") is None:
        return
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _, plain = make_steps(device)
        model, steps = make_steps(device)
        adopt(model)
        for name, step in steps.items():
            rounds = ROUNDS[device] * (3 if name == "decoding" else 1)
            times = in_turns(plain[name], step, device, rounds, subjects(device))
            for subject in list(times)[1:]:
                yield Row(
                    "adopt", f"Llama, {name}, {subject} ({device})", times[subject], "ms", "plain", times["plain"]
                )


def make_steps(device: str) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """Return a Llama, and the steps to measure."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[device], num_key_value_heads=8, vocab_size=32000, attn_implementation="sdpa")
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(0, 32000, (1, PROMPT[device]), device=device)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :CACHED], use_cache=True, past_key_values=cache)

    def prefill() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1).logits  # compiled code computes only what is returned

    def decoding() -> None:
        with torch.no_grad():
            model(ids[:, :1], use_cache=True, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    def training() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return model, {"prefill": prefill, "decoding": decoding, "training": training}


def timed(step: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of a warm step; of short ones, such as decoding, the mean of some.

    The first step after a change of mappings decides what serves, which takes as long as several steps of decoding, and
    Python runs a function quickly only after it was called a few times.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    synchronize()
    start, count = time.perf_counter(), 0
    while count < 1 or (count < 8 and time.perf_counter() - start < 0.03):
        step()
        synchronize()
        count += 1
    start = time.perf_counter()
    for _ in range(count):
        step()
        synchronize()
    return (time.perf_counter() - start) / count * 1e3


def subjects(device: str) -> Subjects:
    """Return the mappings to compare."""
    found: Subjects = {"plain": None, "adopted": {}}
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        found["adopted, pack:liger"] = LIGER
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        found["adopted, pack:triton"] = {key: {"cuda": "pack:triton"} for key in TRITON}
    return found


def in_turns(
    plain: Callable[[], Any],
    step: Callable[[], Any],
    device: str,
    rounds: int,
    mappings: Subjects,
    choice: Path | None = None,
) -> dict[str, float]:
    """Time steps in turns, each round in another order; return the medians in milliseconds.

    Args:
        plain: The step of a model that is not adopted.
        step: The same of one that is, for each mapping.
        device: Where they run.
        rounds: How often.
        mappings: What to compare; None for `plain`.
        choice: A choice for those whose name begins with "chosen".
    """
    times: dict[str, list[float]] = {name: [] for name in mappings}
    scopes = {name: use_kernel_mapping(mapping or {}) for name, mapping in mappings.items()}
    order, shuffled = list(mappings), random.Random(rounds)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            chosen = use_choice(choice) if name.startswith("chosen") and choice is not None else None
            with scopes[name]:
                times[name].append(timed(plain if mappings[name] is None else step, device))
            if chosen is not None:
                chosen.close()
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}
