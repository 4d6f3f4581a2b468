"""How long runs take, in turns: launched by the CPU, and replayed from a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], object]

_FEWEST, _MOST = 9, 200
"""Rounds of each run."""

_OTHERS = bytearray(1 << 20)
"""Copied before each run: in a model, other code has used the caches of the CPU since the last call of a layer. A call
that is repeated in a loop looks twice as fast, and the more code it runs, the more so: compiled ones above all."""

_FLUSH = 256 << 20
"""Bytes that are written between runs, so that these find a cold L2 cache: more than any GPU has."""


@dataclass(frozen=True)
class Timing:
    """The seconds that a run takes.

    Attributes:
        host: Of the CPU, to launch it.
        busy: Of the device; the same where that is the CPU.
        captured: Replayed from a CUDA graph; None where that was not measured.
        not_captured: Why not.
    """

    host: float
    busy: float
    captured: float | None = None
    not_captured: str = ""

    @property
    def launched(self) -> float:
        """Where nothing else waits for the device: the longer of both."""
        return max(self.host, self.busy)


def time_runs(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    budget: float,
    capture: bool = True,
    before: Callable[[str], object] = lambda name: None,
) -> Iterator[tuple[str, Timing | Exception]]:
    """Time runs against each other; yield each with its time, or what it raised.

    Rounds are made in turns, in a random order: a machine that slows down slows down all of them.

    Args:
        runs: What to run, by name. Each is run a few times before.
        device: Where they run.
        budget: Seconds for all rounds of one run, roughly.
        capture: Whether to capture them in CUDA graphs, too.
        before: Called with the name of each run before it is made: it may end the process.
    """
    once: dict[str, float] = {}
    launched: dict[str, list[float]] = {}
    broken: dict[str, Exception] = {}
    for name, run in runs.items():
        before(name)
        try:
            once[name], launched[name] = _warm(run, device), []
        except Exception as error:  # a candidate that fails is out; one that breaks the device breaks the next, too
            broken[name] = error
    slowest = max(once.values(), default=1.0) + launch_time(lambda: None, device)
    rounds = max(_FEWEST, min(_MOST, int(budget / slowest)))
    order, shuffled = list(launched), random.Random(rounds)  # its own generator: the user's is left alone
    with _quiet():
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                if name in broken:
                    continue
                before(name)
                try:
                    launched[name].append(launch_time(runs[name], device))
                except Exception as error:
                    broken[name] = error
    yield from broken.items()
    for name, times in launched.items():
        if name in broken:
            continue
        run, host = runs[name], sorted(times)[len(times) // 4]  # other work on the machine only ever adds time
        if device.type != "cuda":
            yield name, Timing(host, host)
            continue
        before(name)
        busy, replayed, reason = device_time(run, device, budget if capture else 0.0)
        yield name, Timing(host, busy, replayed, reason)


def device_time(run: Run, device: torch.device, budget: float) -> tuple[float, float | None, str]:
    """Return the seconds of a GPU for a run; the same replayed from a CUDA graph, or None, and why not.

    Without a budget, nothing is captured.
    """
    reason = "not asked for"
    if budget:
        try:
            replayed = _replayed(run, device, budget)
            return replayed, replayed, ""
        except Exception as error:
            reason = f"it cannot be captured in a CUDA graph: {type(error).__name__}: {error}".partition("\n")[0]
    return _waited(run, device), None, reason


def _warm(run: Run, device: torch.device) -> float:
    """Run a few times, for what is compiled or allocated then; return the seconds of the quickest."""
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def launch_time(run: Run, device: torch.device) -> float:
    """Return the seconds until the CPU is through with a run: on a GPU, it does not wait for that."""
    synchronize(device)
    bytes(_OTHERS)
    start = time.perf_counter()
    run()
    if device.type != "cuda":
        synchronize(device)
    return time.perf_counter() - start


def _replayed(run: Run, device: torch.device, budget: float) -> float:
    """Return the seconds of a run in a CUDA graph, with a cold cache: those of flush and run, less those of a flush."""
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)
    times = []
    for body in ((flush.zero_, run), (flush.zero_,)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                for step in body:
                    step()
        graph.replay()
        taken = [_between(graph.replay) / 8 for _ in range(max(5, min(25, int(budget / 8e-3))))]
        times.append(statistics.median(taken))
    return max(times[0] - times[1], 1e-7)


def _waited(run: Run, device: torch.device) -> float:
    """Return the seconds of the device for a run that cannot be captured."""
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)
    # While the device is busy with the flush, the CPU launches the run.
    return statistics.median(_between(run, before=flush.zero_) for _ in range(_FEWEST))


def _between(run: Run, before: Run = lambda: None) -> float:
    """Return the seconds of the device between the start and the end of a run."""
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    before()
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Collect garbage before, and not in between."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
