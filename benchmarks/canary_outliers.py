"""The price of a canary's outlier trigger in a step of training: `python canary_outliers.py`.

Of two models: the demo's block, and a Llama of transformers with the widths of one of 8 billion parameters. One canary
is open, which compares no call, and its trigger is turned off and on between steps. The inputs are the same in each
step, so no call is an outlier: what is measured is the search for them.

A round is each setting in a shuffled order, and then in the reverse of it, without a wait in between; events on the GPU
say when each step is done. So a clock that drifts, and the neighbours of a step, are the same for all. The result is
the median, over the rounds, of the ratio to the steps without the trigger of the same round.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from adopt import TRITON
from canary import kernels_of_demo
from in_model import median_interval
from measure import Row

from kernels_core import KernelsWarning
from kernels_plugins import adopt, canary, use_kernel_mapping
from kernels_plugins.canary import outliers, reader

LIMIT = 1.01
ROUNDS = 150
LLAMA_ROUNDS = {4: 40, 16: 25}
"""By the number of layers. In each forward, transformers waits for the GPU once, and then the GPU for the host, for a
layer or so: that is a larger part of a step of few layers, whose ratio has no limit."""

WARM_SECONDS = 5.0
PLAIN = "without the trigger"
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 32000
"""Not that of the 8 billion: with its large head, a step of a few layers would take longer, and the trigger less."""

TOKENS = 4096


def run() -> Iterator[Row]:
    """Measure on a CUDA device where there is one, else on the CPU, where no limit counts."""
    step, device, scope = kernels_of_demo(updates=True)
    with scope:
        yield from of_model(f"demo's block, training step ({device})", step, device, ROUNDS)
    if device == "cuda" and importlib.util.find_spec("transformers") and importlib.util.find_spec("triton"):
        for layers, rounds in LLAMA_ROUNDS.items():
            step, model = llama_step(layers)
            adopted = adopt(model)
            with use_kernel_mapping({name: {"cuda": "pack:triton"} for name in TRITON}):
                what = f"Llama, {layers} layers, {TOKENS} tokens, training step ({device})"
                yield from of_model(what, step, device, rounds, limit=layers == max(LLAMA_ROUNDS))
            adopted.undo()


def llama_step(layers: int) -> tuple[Callable[[], None], Any]:
    """Return a step of training, with AdamW, and its model. The learning rate is zero: numbers stay the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA, num_hidden_layers=layers, vocab_size=VOCABULARY, attn_implementation="sdpa")
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), device="cuda")

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def of_model(what: str, step: Callable[[], None], device: str, rounds: int, *, limit: bool = True) -> Iterator[Row]:
    """Measure the steps of a model without the trigger twice, which shows the noise, with it, and in other ways."""
    subjects: dict[str, Callable[[canary], None]] = {
        PLAIN: lambda opened: trigger(opened, on=False),
        "without again": lambda opened: trigger(opened, on=False),
        "trigger": lambda opened: trigger(opened, on=True),
        "trigger, large tensors as a whole": lambda opened: trigger(opened, on=True, limit=2**62),
        "trigger, PyTorch's operators": lambda opened: trigger(opened, on=True, kernel=False),
    }
    with warnings.catch_warnings(), canary(first=0, every=0, action="raise") as opened:
        warnings.simplefilter("error", KernelsWarning)
        taken = measure(subjects, opened, step, device, rounds)
        trigger(opened, on=True)
        share = device_share(step) if device == "cuda" else None
    for subject in list(subjects)[1:]:
        ratio, below, above = median_interval(
            [ours / plain for ours, plain in zip(taken[subject], taken[PLAIN], strict=True)]
        )
        most = LIMIT if limit and device == "cuda" and subject == "trigger" else None
        middle = statistics.median(taken[subject])
        yield Row("outliers", f"{what}, {subject}", middle, "ms", PLAIN, statistics.median(taken[PLAIN]))
        yield Row("outliers", "... median of ratios", ratio, "x")
        # Judged by the upper end: it is to be sure that the limit is kept.
        yield Row("outliers", "... 95 % of such medians are below", above, "x", "and above", below, limit=most)
    if share is not None:
        reads, spent, whole = share
        yield Row("outliers", f"{what}, {reads} kernels that read", spent, "us", "all kernels", whole)


def trigger(opened: canary, *, on: bool, limit: int = reader.READ, kernel: bool = True) -> None:
    """Turn the trigger of an open canary on or off: opening another one would start its search anew."""
    object.__setattr__(opened.settings, "outliers", on)
    reader.READ = limit
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        outliers._reader(device)._kernel = reader._kernel_for(device) if kernel else None


def measure(
    subjects: dict[str, Callable[[canary], None]], opened: canary, step: Callable[[], None], device: str, rounds: int
) -> dict[str, list[float]]:
    """Return milliseconds of a step of each subject for each round."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_SECONDS:
        for choose in subjects.values():
            choose(opened)
            step()
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for _ in range(rounds if device == "cuda" else 2):
        random.shuffle(order)
        names = [*order, *reversed(order)]
        marks = [mark(device)]
        for name in (names[0], *names):  # one more at first, while the queue of the GPU fills
            subjects[name](opened)
            step()
            marks.append(mark(device))
        if device == "cuda":
            torch.cuda.synchronize()
        spent = [between(*pair) for pair in itertools.pairwise(marks[1:])]
        for name in subjects:
            taken[name].append(sum(time for name_, time in zip(names, spent, strict=True) if name_ == name) / 2)
    return taken


def mark(device: str) -> Any:
    """Return a point in time: of the GPU, where it is to come."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Return the milliseconds between two points in time."""
    return float((end - start) * 1e3) if isinstance(start, float) else start.elapsed_time(end)


def device_share(step: Callable[[], None]) -> tuple[int, float, float]:
    """Return how many kernels of a step read inputs, the microseconds of these, and those of all its kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    found = [(event.key, event.count, event.self_device_time_total) for event in profiled.key_averages()]
    reads = [(count, microseconds) for key, count, microseconds in found if key.startswith("_largest_kernel")]
    spent = sum(microseconds for _, microseconds in reads)
    return sum(count for count, _ in reads) // 3, spent / 3, sum(microseconds for *_, microseconds in found) / 3


def main() -> int:
    """Print the rows; 1 if the limit is broken."""
    torch.manual_seed(0)
    rows = []
    for row in run():
        peer = "" if row.peer_value is None else f", {row.peer} {row.peer_value:.4f}, ratio {row.ratio:.4f}"
        print(f"{row.subject}: {row.value:.4f} {row.unit}{peer}", flush=True)
        rows.append(row)
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
