"""The kernels of the pack `triton`: bandwidth against a copy, the loss against other ways, and time on the host.

GPU times are medians of replays of a CUDA graph with a cold L2 cache. A copy moves as many bytes as the kernel must
move at least: inputs read once, outputs written once.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import Row
from torch import Tensor
from torch.nn import functional

WIDTHS = (4096, 5120, 7168, 8192, 12288)
TOKENS = 8192
DTYPE = torch.bfloat16
LOSS = (8192, 4096, 128256)
"""Tokens, width and vocabulary."""

Call = Callable[[], Any]


def run() -> Iterator[Row]:
    """Measure on a CUDA device with Triton; nothing elsewhere."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    torch.manual_seed(0)
    yield from bandwidths()
    yield from losses()
    yield from hosts()


def tensor(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=grad)


# --- Bandwidth -------------------------------------------------------------------------------------


def bandwidths() -> Iterator[Row]:
    """Compare each kernel with a copy, forward and backward."""
    from kernels_plugins import add_rms_norm
    from kernels_plugins.packs.triton import gated, rms_norm, rotary

    for width in WIDTHS:
        size = f"{TOKENS}x{width}"
        inputs = [tensor(TOKENS, width), tensor(width)]
        yield from against_copy(f"RMSNorm {size}", lambda x, w: rms_norm.rms_norm(x, w, 1e-6), inputs, (2, 3))
        inputs.insert(1, tensor(TOKENS, width))
        call = partial(add_rms_norm, eps=1e-6)
        yield from against_copy(f"add + RMSNorm {size}", call, inputs, (4, 4), (0.95, 0.85))
    inputs = [tensor(TOKENS, 14336), tensor(TOKENS, 14336)]
    for name, kind in (("SiLU", gated.SILU), ("GELU", gated.GELU), ("GELU by tanh", gated.GELU_TANH)):
        call = partial(gated.gated, kind=kind)
        yield from against_copy(f"{name} and product {TOKENS}x14336", call, inputs, (3, 5))
    q, k = (tensor(1, TOKENS, heads, 128) for heads in (32, 8))
    angles = [tensor(1, TOKENS, 128, grad=False) for _ in range(2)]
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k)]
    call = partial(rotary.rotary, cos=angles[0], sin=angles[1])
    yield from against_copy(f"rotary, 32 + 8 heads of 128, {TOKENS} tokens", call, inputs, (2.5, 2.5), (0.8, 0.8))


def against_copy(
    name: str,
    call: Callable[..., Any],
    inputs: list[Tensor],
    moved: tuple[float, float],
    least: tuple[float, ...] = (0.9, 0.9),
) -> Iterator[Row]:
    """Time a call, and its backward; `moved`: the tensors of the first input's size that these read and write."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the backward runs on the stream of its forward, and that one has to be captured
        outputs = call(*inputs)
    stream.synchronize()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y) for y in outputs]
    forward = partial(call, *(x.detach() for x in inputs))
    backward = partial(torch.autograd.grad, outputs, inputs, grads, retain_graph=True)
    for direction, run_it, count, bound in zip(("forward", "backward"), (forward, backward), moved, least, strict=True):
        half = int(inputs[0].nbytes * count) // 2
        source = torch.randint(256, (half,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        copy = replayed(partial(torch.empty_like(source).copy_, source), stream)
        ours = replayed(run_it, stream)
        yield Row("triton", f"{name}, {direction}", ours, "us", "copy", copy, 1 / bound, judge="ratio")
        del source


def replayed(call: Call, stream: torch.cuda.Stream) -> float:
    """Return the median time of a replay of a call, in microseconds."""
    from triton.testing import do_bench

    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return do_bench(graph.replay, warmup=10, rep=50, return_mode="median") * 1e3


# --- Loss ------------------------------------------------------------------------------------------


def losses() -> Iterator[Row]:
    """Compare the loss of a causal model, forward and backward, with eager, compiled and Liger's."""
    from kernels_plugins import linear_cross_entropy

    tokens, width, vocabulary = LOSS
    hidden = tensor(tokens, width)
    weight = (torch.randn(vocabulary, width, device="cuda", dtype=DTYPE) * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device="cuda")

    def eager() -> Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)

    subjects = {"eager": eager, "ours": lambda: linear_cross_entropy(hidden, weight, labels)}
    subjects["compiled"] = torch.compile(eager)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        subjects["Liger"] = lambda: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]
    times: dict[str, list[float]] = {name: [] for name in subjects}
    peaks = {}
    for turn in range(3):  # in turns, for a GPU that grows warm grows slow
        for name, call in subjects.items():

            def step(call: Callable[[], Tensor] = call) -> None:
                torch.autograd.grad(call(), (hidden, weight))

            for _ in range(2 if not turn else 1):
                step()
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(3):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                step()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            torch.cuda.empty_cache()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    what = f"linear + cross entropy {tokens}x{width}x{vocabulary}"
    for name in list(subjects)[1:]:
        ours = name == "ours"
        limits: dict[str, Any] = {"limit": 0.85, "judge": "ratio"} if ours else {}
        yield Row("triton", f"{what}, {name}", medians[name], "ms", "eager", medians["eager"], **limits)
        limits = {"limit": 1.5} if ours else {}
        yield Row("triton", f"{what}, {name}, memory", peaks[name], "GiB", "eager", peaks["eager"], **limits)


# --- Host ------------------------------------------------------------------------------------------


def hosts() -> Iterator[Row]:
    """Compare the time on the host of a norm of few rows with that of PyTorch's operator."""
    from kernels_plugins.packs.triton import rms_norm

    x, weight, gradient = tensor(16, 4096), tensor(4096), tensor(16, 4096, grad=False)
    calls: dict[str, Callable[..., Tensor]] = {
        "ours": lambda: rms_norm.rms_norm(x, weight, 1e-6),
        "torch": lambda: functional.rms_norm(x, weight.shape, weight, 1e-6),
    }

    def both(call: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(call(), (x, weight), gradient)

    with torch.no_grad():
        forward = {name: on_host(call) for name, call in calls.items()}
    with_backward = {name: on_host(partial(both, call)) for name, call in calls.items()}
    for name, times, limit in (("forward", forward, 1.3), ("forward and backward", with_backward, None)):
        what = f"RMSNorm 16x4096 on the host, {name}"
        peer = "torch rms_norm"
        yield Row("triton", what, times["ours"], "us", peer, times["torch"], limit, goal=1.3, judge="ratio")


def on_host(call: Call, count: int = 300) -> float:
    """Return the microseconds that one of many calls in a row takes on the host: the least of several medians."""
    taken = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(taken[1:])
