"""Caches of compiled code in a second process: undecorated code, and the same with an opaque kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

PROGRAM = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch._dynamo.utils import counters
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import opaque, register_kernel_mapping

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

class Kernel(nn.Module):
    def forward(self, x):
        return nn.functional.rms_norm(x, (64,), self.weight, self.eps)

if sys.argv[1] == "opaque":
    use_kernel_forward_from_hub("Norm")(Norm)
    register_kernel_mapping({"Norm": {"cpu": opaque(Kernel)}})
model = nn.Sequential(*[layer for _ in range(4) for layer in (Norm(), nn.Linear(64, 64), nn.SiLU())])
x = torch.ones(8, 64, requires_grad=True)
import torch._inductor.compile_fx  # not what is measured
start = time.perf_counter()
torch.compile(model, fullgraph=True)(x).sum().backward()
seconds = time.perf_counter() - start
found = {**counters["aot_autograd"], **counters["inductor"]}
print(json.dumps({"seconds": seconds, **{k: v for k, v in found.items() if k.endswith(("cache_hit", "cache_miss"))}}))
"""


def main() -> None:
    """Print a line for each process: the seconds of the first step, and what the caches on disk had."""
    for kind in ("undecorated", "opaque"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
            for process in ("first", "second"):
                done = subprocess.run(
                    [sys.executable, "-c", PROGRAM, kind], env=environment, capture_output=True, text=True, check=True
                )
                print(kind, process, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
