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

from kernels_core import error_text

from ..oracle.probe import captured

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
    left = {name: runs[name] for name in launched if name not in broken}
    of_device = device_times(left, device, budget if capture else 0.0, before) if device.type == "cuda" else {}
    for name in left:
        times = launched[name]
        host = sorted(times)[len(times) // 4]  # other work on the machine only ever adds time
        yield name, Timing(host, *of_device.get(name, (host,)))


def device_times(
    runs: Mapping[str, Run],
    device: torch.device,
    budget: float,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, tuple[float, float | None, str]]:
    """Return the seconds of a GPU for each run; the same replayed from a CUDA graph, or None, and why not.

    Replays are made in turns, too: a GPU that multiplies large matrices lowers its clock meanwhile.

    Args:
        runs: What to run, by name.
        device: The GPU.
        budget: Seconds for all replays of one run, roughly; without, nothing is captured.
        before: As for `time_runs`.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):  # events and graphs are of the current GPU
        return _device_times(runs, device, budget, before)


def _device_times(
    runs: Mapping[str, Run], device: torch.device, budget: float, before: Callable[[str], object]
) -> dict[str, tuple[float, float | None, str]]:
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)
    pool = torch.cuda.graph_pool_handle() if budget else None  # shared: nothing reads what a replay leaves there
    nothing = object()
    work: dict[Any, Run] = {nothing: lambda: None, **runs}  # a flush alone: its time is not that of a run
    replays: dict[Any, tuple[Run, int]] = {}
    taken: dict[Any, list[float]] = {one: [] for one in work}
    why: dict[Any, str] = dict.fromkeys(work, "not asked for")
    order, shuffled = list(work), random.Random(len(work))
    for number in range(max(_FEWEST, min(25, int(budget / 8e-3))) if budget else 0):
        for one in order:
            if one is not nothing:
                before(one)
            try:
                if not number:
                    # Several in a graph, for the clock is coarse; not for longer than that of the GPU is steady.
                    times = max(1, min(8, int(4e-3 / max(_between(work[one], flush.zero_), 1e-6))))
                    replays[one] = _replays(times, pool, flush.zero_, work[one]), times
                elif one in replays:
                    replay, times = replays[one]
                    taken[one].append(_between(replay) / times)
            except Exception as error:
                replays.pop(one, None)
                pool = torch.cuda.graph_pool_handle()
                text = error_text(error).partition("\n")[0]
                why[one] = f"it cannot be captured in a CUDA graph: {text}"
        shuffled.shuffle(order)
    found: dict[str, tuple[float, float | None, str]] = {}
    for name, run in runs.items():
        if name in replays and nothing in replays:
            replayed = max(statistics.median(taken[name]) - statistics.median(taken[nothing]), 1e-7)
            found[name] = replayed, replayed, ""
        else:
            before(name)
            # While the device is busy with the flush, the CPU launches the run.
            waited = statistics.median(_between(run, before=flush.zero_) for _ in range(_FEWEST))
            found[name] = waited, None, why[name] if name not in replays else why[nothing]
    return found


def _replays(times: int, pool: Any, *steps: Run) -> Run:
    """Return a function that replays a CUDA graph in which some steps are made some times."""

    def run() -> None:
        for _ in range(times):
            for step in steps:
                step()

    return captured(run, pool)[0].replay


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
