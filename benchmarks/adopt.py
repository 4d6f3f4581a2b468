"""A model of transformers, plain and adopted: prefill, one step of decoding, and a training step."""

from __future__ import annotations

import contextlib
import importlib.util
import operator
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

CALLS = {"prefill": 1, "decoding": 8, "training": 1}
"""The calls of each step that are timed in a turn."""

Subject = tuple[Callable[[], Any], Callable[[], contextlib.AbstractContextManager[None]]]
"""A step, and the scope that its turn is in."""


def run() -> Iterator[Row]:
    """Measure on the CPU in float32 and, where there is one, on a CUDA device in bfloat16."""
    if importlib.util.find_spec("transformers") is None:
        return
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _, plain = make_steps(device)
        model, steps = make_steps(device)
        adopt(model)
        for name, step in steps.items():
            fixed = {subject: mapped(step, mapping) for subject, mapping in mappings(device).items()}
            rounds = ROUNDS[device] * (3 if name == "decoding" else 1)
            times = in_turns({"plain": (plain[name], contextlib.nullcontext), **fixed}, device, rounds, CALLS[name])
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


def timed(step: Callable[[], Any], device: str, calls: int) -> float:
    """Return the milliseconds of a warm step, the mean of some calls after as many that are not timed.

    The first step after a change of mappings decides what serves, which takes as long as several steps of decoding, and
    Python runs a function quickly only after it was called a few times.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    start = 0.0
    for count in (calls, calls):
        start = time.perf_counter()
        for _ in range(count):
            step()
            synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def mappings(device: str) -> dict[str, Mapping[str, Any]]:
    """Return the mappings to compare, by name."""
    found: dict[str, Mapping[str, Any]] = {"adopted": {}}
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        found["adopted, pack:liger"] = LIGER
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        found["adopted, pack:triton"] = {key: {"cuda": "pack:triton"} for key in TRITON}
    return found


def mapped(step: Callable[[], Any], mapping: Mapping[str, Any], choice: Path | None = None) -> Subject:
    """Return the subject that is a step in the scope of a mapping, and with a choice if one is given."""
    scope = use_kernel_mapping(mapping)

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.nullcontext() if choice is None else use_choice(choice), scope:
            yield

    return step, entered


def in_turns(subjects: Mapping[str, Subject], device: str, rounds: int, calls: int) -> dict[str, float]:
    """Time steps in turns, each round in another order; return milliseconds, those of the first subject a median.

    The others are it times the median of the ratios in one round: hosts have phases of seconds in which all is slower.
    All subjects make the same number of calls in a turn: a GPU that works without a pause lowers its clock.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    order, shuffled = list(subjects), random.Random(rounds)
    for _ in range(1 + rounds):
        shuffled.shuffle(order)
        for name in order:
            step, entered = subjects[name]
            with entered():
                times[name].append(timed(step, device, calls))
    first = times[next(iter(subjects))][1:]
    return {
        name: statistics.median(first) * statistics.median(map(operator.truediv, taken[1:], first))
        for name, taken in times.items()
    }
