"""What all benchmarks share: interleaved timing, and the rows that they report."""

from __future__ import annotations

import importlib.util
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

ROUND_SECONDS = 0.001
ROUNDS = 20
REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        bench: The benchmark that made it.
        subject: What was measured.
        value: The measure, in `unit`.
        unit: `ns`, `us`, `ms`, or a word such as `guards`.
        peer: What it is compared with; empty for nothing.
        peer_value: The measure of the peer; None if the peer is not here.
        limit: Breaks the build if exceeded; None for a report only.
        goal: What we would like to see.
        judge: Whether limit and goal speak of the ratio or of the value.
    """

    bench: str
    subject: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    limit: float | None = None
    goal: float | None = None
    judge: Literal["ratio", "value"] = "value"

    @property
    def ratio(self) -> float | None:
        """Subject over peer."""
        return self.value / self.peer_value if self.peer_value else None

    @property
    def passed(self) -> bool | None:
        """Whether the limit is kept; None where there is no limit."""
        if self.limit is None:
            return None
        judged = self.ratio if self.judge == "ratio" else self.value
        return judged is not None and judged <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "passed": self.passed}


def on_each_device(measure: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """Measure with one thread on the CPU and, where there is one, on a CUDA device; nothing without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return
    threads = torch.get_num_threads()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        torch.set_num_threads(1)
        try:
            yield from measure(device)
        finally:
            torch.set_num_threads(threads)


def compare(
    statements: Mapping[str, tuple[str, dict[str, Any]]], *, rounds: int = ROUNDS, repeats: int = REPEATS
) -> dict[str, float]:
    """Time statements in turns and return nanoseconds for each.

    Each statement has compiled code of its own, so that no inline cache is shared. A round runs every statement for
    about a millisecond; the results are the medians of the quietest of several repeats, so that what else runs
    on the machine disturbs all alike, or not at all.

    Args:
        statements: For each subject, source and the globals that it runs in.
        rounds: Rounds in each median.
        repeats: Repeats to take the quietest of.
    """
    timers = {name: timeit.Timer(source, globals=names) for name, (source, names) in statements.items()}
    counts = {}
    for name, timer in timers.items():
        timer.timeit(20)  # warm
        counts[name] = max(1, int(ROUND_SECONDS / (min(timer.repeat(3, 20)) / 20)))
    medians: list[dict[str, float]] = []
    order = list(timers)
    for _ in range(repeats):
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            order = order[1:] + order[:1]  # nobody always runs after the same neighbour
            for name in order:
                times[name].append(timers[name].timeit(counts[name]) / counts[name])
        medians.append({name: statistics.median(taken) for name, taken in times.items()})
    quietest = min(medians, key=lambda taken: sum(taken.values()))
    return {name: value * 1e9 for name, value in quietest.items()}
