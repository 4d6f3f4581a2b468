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
    known = dict(os.environ, WORLD_SIZE=str(world), HF_HUB_OFFLINE="1", **environment)
    code = PRELUDE + textwrap.dedent(program)

    def run(rank: int) -> Any:
        own = {**known, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        compiler = "torch.distributed.tensor" in program or "torch.compile(" in program
        return run_python("-c", code, environment=own, folder=folder, compiler=compiler)

    with ThreadPoolExecutor(world) as pool:
        ended = list(pool.map(run, range(world)))
    for rank, process in enumerate(ended):
        assert process.returncode == 0, f"rank {rank}: {process.stdout[-500:]}{process.stderr[-3000:]}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


FORKED = """
import os, runpy, sys, traceback
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor
from torch.distributed import run
def work():
    try:
        runpy.run_path("train.py", run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
configured = run.config_from_args
run.config_from_args = lambda args: (configured(args)[0], work, [])
run.main(sys.argv[1:])
"""
"""torchrun, with ranks that are forked from it, in place of programs that each import PyTorch."""


def torchrun(
    folder: Path, program: str, world: int, *options: str, forked: bool = True, **environment: str
) -> CompletedProcess[str]:
    """Run a program as so many ranks of one host with torchrun.

    Args:
        folder: Where they run; the program is `train.py` there.
        program: Its code.
        world: The number of ranks.
        options: More options of torchrun.
        forked: Whether the ranks are forked from torchrun; they import our packages anew.
        environment: Variables, besides those of this process.
    """
    (folder / "train.py").write_text(textwrap.dedent(program))
    command = ["--standalone", "--monitor-interval", "0.1", "--nproc-per-node", str(world), *options]
    known = {**os.environ, **environment}
    if forked:
        command = ["-c", FORKED, *command, "--start-method", "fork", "train.py"]
        return run_python(*command, environment=known, folder=folder, compiler=True)
    command = [sys.executable, "-m", "torch.distributed.run", *command, "train.py"]
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True)
