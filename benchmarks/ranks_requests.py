"""Count the requests that many ranks send to a local Hub, as a table: `python benchmarks/ranks_requests.py`.

Ranks are simulated on one machine: processes forked from one that has imported PyTorch, at most 32 at a time; each
keeps nothing of the others in memory, as a process that has just started. Eight ranks are a host, with a cache of its
own. Each rank decides about one layer of each repository, by version, checks its files, imports it and runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kernels_core import Mode, plugin_manager, resolve
from kernels_plugins import LayerRepository, use_kernel_mapping
from kernels_plugins.hub.client import answers
from kernels_plugins.local_hub.server import LocalHub
from kernels_plugins.local_hub.testing import publish_kernels

RANKS = (1, 8, 64, 256, 1000)
REPOSITORIES, PER_HOST, AT_ONCE = 10, 8, 32
ALONE = {"KERNELS_LEADER": "0", "KERNELS_SHARE_SECONDS": "0"}
WAYS = {"each rank asks": ALONE, "processes of one cache share": {"KERNELS_LEADER": "0"}, "ranks share": {}}
LINEAR = 64
"""Ranks up to which those that ask for themselves are counted: their requests are a multiple of one rank's."""

KERNEL = "import torch\n\n\nclass Wave(torch.nn.Module):\n    def forward(self, x):\n        return x * {}\n"


def rank() -> bool:
    """Resolve all kernels, and return whether each of them serves."""
    served = []
    for number in range(REPOSITORIES):
        source = LayerRepository(f"acme/waves{number}", layer_name="Wave", version=1)
        with use_kernel_mapping({"Wave": {"cpu": source}}):
            kernel = resolve("Wave", device="cpu", mode=Mode.INFERENCE).kernel_layer
        served.append(isinstance(kernel, type) and kernel()(torch.ones(1)).item() == number)
    return all(served)


def start(count: int, caches: Path) -> int:
    """Start so many ranks as processes of this one, and return how many had every kernel."""
    plugin_manager().plugins()
    import kernels_plugins.hub.kernel
    import kernels_plugins.hub.source  # noqa: F401 - once for all ranks

    answers._started = time.time()
    running: set[int] = set()
    served = 0
    for number in range(count):
        if len(running) == AT_ONCE:
            served += _ended(running)
        if (child := os.fork()) == 0:
            os.environ["KERNELS_CACHE"] = str(caches / f"host{number // PER_HOST}")
            os._exit(0 if rank() else 1)
        running.add(child)
    while running:
        served += _ended(running)
    return served


def _ended(running: set[int]) -> bool:
    child, status = os.wait()
    running.discard(child)
    return status == 0


def rows() -> Iterator[tuple[str, int, list[str]]]:
    """Count for each way and number of ranks: requests of a cold and of a warm start."""
    for way, settings in WAYS.items():
        for count in (number for number in RANKS if settings is not ALONE or number <= LINEAR):
            with tempfile.TemporaryDirectory() as place, LocalHub() as hub:
                for number in range(REPOSITORIES):
                    publish_kernels(hub, f"acme/waves{number}", KERNEL.format(number)).branch("v1")
                cells = []
                for job in ("cold", "warm"):
                    hub.forget()
                    leader = {} if "KERNELS_LEADER" in settings else {"KERNELS_LEADER_DIR": f"{place}/{job}"}
                    environment = {
                        **os.environ,
                        **hub.environment(Path(place)),
                        **settings,
                        **leader,
                        "OMP_NUM_THREADS": "1",
                    }
                    command = [sys.executable, __file__, str(count), place]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    served = json.loads(done.stdout.splitlines()[-1])
                    api = hub.count(lambda request: "/api/" in request.path)
                    cells.append(
                        f"{api:,} + {hub.count() - api:,}" + ("" if served == count else f" ({served} served)")
                    )
                yield way, count, cells


def main() -> None:
    """Print the table, or run ranks: with their number, and the folder of their caches."""
    if len(sys.argv) == 3:
        print(start(int(sys.argv[1]), Path(sys.argv[2])))
        return
    print("| Way | Ranks | Cold: API + files | Warm: API + files |\n|---|---|---|---|")
    for way, count, cells in rows():
        print(f"| {way} | {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
