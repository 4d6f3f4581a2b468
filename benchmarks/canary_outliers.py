"""The price of a canary's outlier trigger in a step of training of a Llama-style block: `python canary_outliers.py`.

One process, three settings in turns: no canary, a canary without the trigger, and the same with it. The inputs are
the same in each step, so no call is an outlier: what is measured is the search for them.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from canary import EVERY, kernels_of_demo, seconds
from measure import Row

from kernels_core import KernelsWarning
from kernels_plugins import canary
from kernels_plugins.canary import outliers

LIMIT = 1.01
STEPS, ROUNDS = 50, 9
WARM = 5
"""Steps after which each magnitude of this block is known."""


def run() -> Iterator[Row]:
    """Measure on a CUDA device where there is one, else on the CPU, where no limit counts."""
    step, device, scope = kernels_of_demo(updates=True)

    def canary_of(trigger: bool) -> Callable[[], AbstractContextManager[object]]:
        return lambda: canary(first=0, every=EVERY, action="raise", outliers=trigger)

    subjects = {"no canary": contextlib.nullcontext, "canary": canary_of(False), "outliers": canary_of(True)}
    subjects["outliers, all numbers"] = canary_of(True)
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    least, order = outliers._READ, list(subjects)
    with scope, warnings.catch_warnings():
        warnings.simplefilter("error", KernelsWarning)
        for _ in range(3):
            step()
        for _ in range(ROUNDS if device == "cuda" else 2):
            order = order[1:] + order[:1]
            for name in order:
                outliers._READ = 2**62 if name.endswith("all numbers") else least
                with subjects[name]():
                    for _ in range(WARM):
                        step()
                    taken[name].append(seconds(step, device, STEPS if device == "cuda" else 3))
    outliers._READ = least
    middle = {name: statistics.median(times) * 1e3 for name, times in taken.items()}
    what = f"Llama-style block, a training step with AdamW ({device})"
    for name in ("outliers", "outliers, all numbers"):
        limit = LIMIT if device == "cuda" and name == "outliers" else None
        text = f"{what}, {name}"
        yield Row("outliers", text, middle[name], "ms", "canary", middle["canary"], limit, judge="ratio")
    yield Row("outliers", f"{what}, outliers", middle["outliers"], "ms", "no canary", middle["no canary"])


def main() -> int:
    """Print the rows; 1 if the limit is broken."""
    rows = list(run())
    for row in rows:
        print(f"{row.subject}: {row.value:.3f} ms, {row.peer} {row.peer_value:.3f} ms, ratio {row.ratio:.4f}")
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
