"""Whether a model waits for its GPU, or for the CPU that launches its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..oracle.subject import stop_if_broken
from .race import RacedCall, runner_of
from .timing import device_times, launch_time


def calls_on_busy_devices(calls: Sequence[RacedCall]) -> frozenset[RacedCall]:
    """Return the calls of passes whose layers keep a GPU busy for longer than the CPU needs to launch them.

    There, the CPU runs ahead of the GPU: a kernel that takes long to launch costs nothing, and one that runs long does.
    """
    waiting: dict[int, float] = defaultdict(float)
    for call in calls:
        if call.device.type == "cuda":
            try:
                run = runner_of(call)(call.recorded.layer.reference)
                run()  # the first time compiles and allocates
                launching = min(launch_time(run, call.device) for _ in range(5))
                busy = device_times({"": run}, call.device, 0.02)[""][0]
            except Exception as error:  # a reference that cannot run on copies: its race reports the reason
                stop_if_broken(error)
                continue
            for number, count in call.passes.items():
                waiting[number] += count * (busy - launching)
    return frozenset(call for call in calls if call.passes and waiting[min(call.passes)] > 0)
