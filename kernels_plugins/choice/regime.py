"""Whether a model waits for its GPU, or for the CPU that launches its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .race import RacedCall, runner_of
from .timing import device_time, launch_time


def calls_on_busy_devices(calls: Sequence[RacedCall]) -> frozenset[RacedCall]:
    """Return the calls of passes whose layers keep a GPU busy for longer than the CPU needs to launch them.

    There, the CPU runs ahead of the GPU: a kernel that takes long to launch costs nothing, and one that runs long does.
    """
    waiting: dict[int, float] = defaultdict(float)
    for call in calls:
        if call.device.type == "cuda":
            run = runner_of(call)(call.recorded.layer.reference)
            run()  # what is compiled or allocated at first
            launching = min(launch_time(run, call.device) for _ in range(5))
            for number, count in call.passes.items():
                waiting[number] += count * (device_time(run, call.device, 0.02)[0] - launching)
    return frozenset(call for call in calls if call.passes and waiting[min(call.passes)] > 0)
