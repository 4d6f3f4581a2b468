"""Kernels on the shards of distributed tensors, on two GPUs with NCCL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from kernels_core import quarantined, use_kernel_forward_from_hub
from kernels_plugins import canary, use_kernel_mapping
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
mesh, ran = init_device_mesh("cuda", (dist.get_world_size(),)), []
def rms(self, x):
    return nn.functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)
class Plain(nn.Module):
    forward = rms
class Layer(nn.Module):
    def forward(self, x):
        return rms(self, x)
Layer = use_kernel_forward_from_hub("Layer")(Layer)
class Kernel(nn.Module):
    local_except = (-1,)
    def forward(self, x):
        ran.append(type(x))
        return rms(self, x)
found = []
for make in Plain, Layer:
    torch.manual_seed(0)
    layer = make()
    layer.weight = nn.Parameter(distribute_tensor(torch.rand(64, device="cuda"), mesh, [Replicate()]))
    x = distribute_tensor(torch.randn(2, 8, 64, device="cuda"), mesh, [Shard(1)]).requires_grad_()
    with use_kernel_mapping({"Layer": {"cuda": Kernel}}):
        y = layer(x)
    y.pow(2).sum().backward()
    found.append([y, x.grad, layer.weight.grad])
assert ran and set(ran) == {torch.Tensor}, ran
for ours, theirs in zip(*found):
    assert ours.placements == theirs.placements
    torch.testing.assert_close(ours.full_tensor(), theirs.full_tensor())
class Wrong(Kernel):
    def forward(self, x):
        return rms(self, x) * (1.5 if dist.get_rank() == 1 else 1.0)
with use_kernel_mapping({"Layer": {"cuda": Wrong}}), canary(first=1, every=0):
    layer(x).sum().backward()
assert len(quarantined()) == 1, quarantined()
print("equal", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")
def test_local_kernels_run_on_shards_with_nccl(tmp_path: Path) -> None:
    """Outputs, gradients and placements are those of the undecorated model; a canary's verdict is that of all ranks."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
