"""The cost of a dispatched call inside of a model: layers of transformers' Llama, with nothing mapped.

The identity layer of `eager` runs in a loop that stays in the caches of the processor. Here, a call comes after the
operators of the layer itself, as in a model.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Row, on_each_device
from torch import nn

from kernels_core import replace_kernel_forward_from_hub, use_kernel_forward_from_hub

LIMIT = 0.4
COPIES, ROUNDS, CALLS = 11, 80, 20
WIDTH, HEADS, HEAD_WIDTH = 64, 2, 32

Calls = dict[str, Callable[[], object]]


def run() -> Iterator[Row]:
    """Measure on the CPU and, where there is one, on a CUDA device; nothing without transformers."""
    return on_each_device(on_device)


def on_device(device: str) -> Iterator[Row]:
    """Measure each layer: plain, behind one hop by hand, and dispatched.

    The median of several copies is reported: where objects and code lie in memory moves a call by some tenths of a
    microsecond, in both directions.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        copies = [{layer: least(calls, wait) for layer, calls in subjects(device).items()} for _ in range(COPIES)]
    for layer in copies[0]:
        plain = statistics.median(copy[layer]["plain"] for copy in copies)
        for subject, limit in (("one hop by hand", None), ("dispatched", LIMIT)):
            more = sorted(copy[layer][subject] - copy[layer]["plain"] for copy in copies)
            what = (
                f"{layer}, {subject}: more than plain, {more[1]:.2f} to {more[-2]:.2f} us but for two copies ({device})"
            )
            yield Row("in place", what, statistics.median(more), "us", "plain", plain, limit=limit)


def subjects(device: str) -> dict[str, Calls]:
    """Return the calls to compare, for each layer."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=HEADS, head_dim=HEAD_WIDTH, vocab_size=100
    )
    with torch.device(device):
        x, cos = torch.randn(1, 1, WIDTH), torch.randn(1, 1, HEAD_WIDTH)
        q, k = (torch.randn(1, HEADS, 1, HEAD_WIDTH) for _ in range(2))
        norms = sharing({name: cls(WIDTH) for name, cls in variants(llama.LlamaRMSNorm).items()})
        blocks = sharing({name: cls(config) for name, cls in variants(llama.LlamaMLP).items()})
    plain = llama.apply_rotary_pos_emb

    def hop(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return plain(q, k, cos, sin, unsqueeze_dim)

    rotate = {"plain": plain, "one hop by hand": hop, "dispatched": use_kernel_forward_from_hub("bench_rotary")(plain)}
    return {
        "LlamaRMSNorm": {name: lambda f=module: f(x) for name, module in norms.items()},  # type: ignore[misc]
        "LlamaMLP": {name: lambda f=module: f(x) for name, module in blocks.items()},  # type: ignore[misc]
        "apply_rotary_pos_emb": {name: lambda f=function: f(q, k, cos, cos) for name, function in rotate.items()},  # type: ignore[misc]
    }


def variants(cls: Any) -> dict[str, type[nn.Module]]:
    """Return three classes with the same forward: as it is, behind a hop, and decorated."""
    forward = cls.forward

    def hop(self: nn.Module, hidden_states: torch.Tensor) -> Any:
        return forward(self, hidden_states)

    plain, hopped, decorated = (
        type(cls.__name__, (cls,), {"forward": function}) for function in (forward, hop, forward)
    )
    replace_kernel_forward_from_hub(decorated, f"bench_{cls.__name__}")
    return {"plain": plain, "one hop by hand": hopped, "dispatched": decorated}


def sharing(modules: dict[str, Any]) -> dict[str, Any]:
    """Give all modules the same tensors: operators take longer where their memory happens to lie badly."""
    first, *others = modules.values()
    for other in others:
        for names in (first._parameters, first._modules):
            for name, value in names.items():
                setattr(other, name, value)
    return modules


def least(calls: Calls, wait: Callable[[], object]) -> dict[str, float]:
    """Return microseconds of a call, the least of many short rounds: that of an undisturbed call."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(10 * CALLS):
            call()
    wait()
    order = list(calls)
    for _ in range(ROUNDS):
        random.shuffle(order)  # no subject always runs after the same neighbour
        for name in order:
            call, start = calls[name], time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
            wait()
    return best
