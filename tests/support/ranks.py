"""A program that runs as several ranks of one job: each reports its findings, and all of them end within a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from fresh_process import run_python

PRELUDE = """
import json, os, sys, warnings
import torch, torch.distributed as dist
from datetime import timedelta
from torch import nn
import kernels_core
from kernels_core import *
R, W = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
def join():
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=R, world_size=W)
def report(**found):
    with open(f"rank{R}.json", "w") as file: json.dump(found, file)
"""


def run_ranks(folder: Path, program: str, world: int = 2, **environment: str) -> list[dict[str, Any]]:
    """Run a program as so many ranks of gloo on this machine; return the report of each.

    The program finds `torch`, `dist`, `nn` and the public names of the core, its rank `R` and the number of ranks `W`.
    It calls `join()` to make the process group, and `report(name=value, ...)` at its end.
    """
    known = dict(os.environ, WORLD_SIZE=str(world), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **environment)
    code = PRELUDE + textwrap.dedent(program)

    def run(rank: int) -> Any:
        own = {**known, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_python("-c", code, environment=own, folder=folder)

    with ThreadPoolExecutor(world) as pool:
        ended = list(pool.map(run, range(world)))
    for rank, process in enumerate(ended):
        assert process.returncode == 0, f"rank {rank}: {process.stdout[-500:]}{process.stderr[-3000:]}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def torchrun(folder: Path, program: str, world: int, *options: str, **environment: str) -> CompletedProcess[str]:
    """Run a program as so many ranks of one host with torchrun.

    Args:
        folder: Where they run; the program is `train.py` there.
        program: Its code.
        world: The number of ranks.
        options: More options of torchrun.
        environment: Variables, besides those of this process.
    """
    (folder / "train.py").write_text(textwrap.dedent(program))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    command += ["--nproc-per-node", str(world), *options, "train.py"]
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True)
