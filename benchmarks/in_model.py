"""The cost of dispatch in a whole model that is bound by the host: one decoding step of transformers' Llama."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row, on_each_device

from kernels_core import replace_kernel_forward_from_hub, use_kernel_forward_from_hub

LIMIT = 1.005
LAYERS = 8
DISPATCHED = 4 * LAYERS + 1
DECORATED = "decorated, nothing mapped"
ROUNDS = 400
PROMPT = 64


def run() -> Iterator[Row]:
    """Measure on the CPU and, where there is one, on a CUDA device; nothing without transformers."""
    return on_each_device(on_device)


def on_device(device: str) -> Iterator[Row]:
    """Measure a step of the plain model twice, which shows the noise, with a hop in each place, and decorated."""
    from transformers.models.llama import modeling_llama as llama

    step, original = make_step(device), read(llama)
    replace_kernel_forward_from_hub(llama.LlamaRMSNorm, "bench_model_RMSNorm")
    replace_kernel_forward_from_hub(llama.LlamaMLP, "bench_model_MLP")
    decorated = {**read(llama), "rotary": use_kernel_forward_from_hub("bench_model_rotary")(original["rotary"])}
    subjects = {"plain": original, "plain again": original, "one hop by hand": hops(original), DECORATED: decorated}
    try:
        taken = measure(subjects, step, device)
    finally:
        write(llama, original)
    for subject in list(subjects)[1:]:
        limit = LIMIT if subject == DECORATED else None
        ratios = [ours / plain for ours, plain in zip(taken[subject], taken["plain"], strict=True)]
        ratio, below, above = median_interval(ratios)
        yield Row("in model", f"decoding step, {subject}: median of ratios ({device})", ratio, "x")
        # Judged by the lower end, so that a busy machine breaks no limit.
        yield Row("in model", "... 95 % of such medians are above", below, "x", "and below", above, limit=limit)
        least = {name: min(times) for name, times in taken.items()}
        yield Row("in model", "... least of the steps", least[subject], "us", "plain", least["plain"])
        more = statistics.median(ours - plain for ours, plain in zip(taken[subject], taken["plain"], strict=True))
        yield Row("in model", f"... more for each of the {DISPATCHED} calls", more / DISPATCHED, "us")


def make_step(device: str) -> Callable[[], None]:
    """Return a function that decodes one token of a small Llama, on top of a short prompt."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    large = device == "cuda"
    config = LlamaConfig(
        hidden_size=4096 if large else 64,
        intermediate_size=14336 if large else 128,
        num_hidden_layers=LAYERS,
        num_attention_heads=32 if large else 2,
        num_key_value_heads=8 if large else 2,
        head_dim=128 if large else 32,
        vocab_size=1000,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if large else torch.float32).eval()
        prompt, token = torch.randint(0, 1000, (1, PROMPT)), torch.randint(0, 1000, (1, 1))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(prompt, use_cache=True, past_key_values=cache)

    def step() -> None:
        with torch.no_grad():
            model(token, use_cache=True, past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    return step


def read(llama: Any) -> dict[str, Any]:
    """Return the three forwards that dispatch."""
    return {
        "norm": llama.LlamaRMSNorm.forward,
        "mlp": llama.LlamaMLP.forward,
        "rotary": llama.apply_rotary_pos_emb,
    }


def hops(forwards: dict[str, Any]) -> dict[str, Any]:
    """Return functions that only call the forwards: the least that any dispatcher in Python does."""
    norm, mlp, rotary = forwards["norm"], forwards["mlp"], forwards["rotary"]

    def rotary_hop(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return rotary(q, k, cos, sin, unsqueeze_dim)

    return {
        "norm": lambda self, hidden_states: norm(self, hidden_states),
        "mlp": lambda self, x: mlp(self, x),
        "rotary": rotary_hop,
    }


def write(llama: Any, forwards: dict[str, Any]) -> None:
    """Let the model use these forwards."""
    llama.LlamaRMSNorm.forward, llama.LlamaMLP.forward = forwards["norm"], forwards["mlp"]
    llama.apply_rotary_pos_emb = forwards["rotary"]


def measure(subjects: dict[str, dict[str, Any]], step: Callable[[], None], device: str) -> dict[str, list[float]]:
    """Return microseconds of one step of each subject for each round, in shuffled order.

    On a CPU, the time of the thread is taken: other processes on the machine do not count. On a GPU, the time until
    the device is done.
    """
    from transformers.models.llama import modeling_llama as llama

    clock = time.thread_time_ns if device == "cpu" else time.perf_counter_ns
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for round_ in range(ROUNDS + 10):
        random.shuffle(order)
        for name in order:
            write(llama, subjects[name])
            step()  # assigning a forward voids what the interpreter has cached
            step()
            wait()
            start = clock()
            step()
            step()
            wait()
            if round_ >= 10:
                taken[name].append((clock() - start) / 2e3)
    return taken


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return a median, and an interval that holds 95 % of the medians of samples drawn from the same values."""
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), medians[25], medians[974]
