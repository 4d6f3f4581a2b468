"""Ranks on two GPUs with NCCL agree: plain, DDP, FSDP2, tensor and sequence parallelism. Skipped without two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

PROGRAM = """
import statistics, time
from kernels_plugins import register_kernel_mapping, use_kernel_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
warnings.simplefilter("ignore")
torch.cuda.set_device(R)
device = torch.device("cuda", R)
dist.init_process_group("nccl", init_method="file://" + os.path.abspath("store"), rank=R, world_size=W)

@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.ones(64))
    def forward(self, x): return x * self.weight
class Fast(nn.Module):
    def forward(self, x): return x * self.weight
class Other(nn.Module):
    def forward(self, x): return x * (1 * self.weight)
class Fails(nn.Module):
    def forward(self, x):
        if failing and R == 1: raise RuntimeError("a fault of this rank")
        return x * self.weight + 0
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = Norm(), nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x): return self.down(self.up(self.norm(x)).relu())
def make(): return nn.Sequential(*(Block() for _ in range(24))).to(device)
def error(call, *args, **kwargs):
    try: call(*args, **kwargs)
    except KernelsError as error: return str(error)
    return ""
failing, found, TRAIN = False, {}, {"device": device, "mode": Mode.TRAINING}
register_kernel_mapping({"Norm": {"cuda": Fast}})
mesh = init_device_mesh("cuda", (W,), mesh_dim_names=("tp",))
up, down = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
plan = {"norm": SequenceParallel(), "up": up, "down": down}
def tensor_parallel():
    model = make()
    for block in model: parallelize_module(block, mesh, plan)
    return model
def sharded():
    model = make()
    for block in model: fully_shard(block)
    fully_shard(model)
    return model
models = {"plain": make(), "ddp": nn.parallel.DistributedDataParallel(make(), device_ids=[R]), "fsdp2": sharded(),
          "tp": tensor_parallel()}
for name, model in models.items():
    found[name] = error(agree, model, **TRAIN, group=mesh)
    with use_kernel_mapping({"Norm": {"cuda": Other if R else Fast}}):
        found[name + " differs"] = error(agree, model, **TRAIN)
    model(torch.randn(2, 8, 64, device=device)).sum().backward()
    found[name + " after a step"] = error(agree, model, **TRAIN)
times = []
for _ in range(50):
    dist.barrier(); torch.cuda.synchronize(); start = time.perf_counter()
    agree(models["plain"], **TRAIN)
    times.append(1e3 * (time.perf_counter() - start))
found["milliseconds"] = statistics.median(times)

with use_kernel_mapping({"Norm": {"cuda": Fails}}):
    model, x = make(), torch.randn(4, 64, device=device)
    found["start"] = error(agree, model, **TRAIN)
    failing = True
    model(x).sum().backward()
    found["waiting"] = [entry.is_waiting for entry in quarantined()]
    found["boundary"] = error(agree, model, **TRAIN)
    origins = {row.origin for row in agree(model, **TRAIN).rows}
    found["out"] = [entry.is_waiting for entry in quarantined()], not any("Fails" in origin for origin in origins)
    release()
found["kernelize"] = error(kernelize, make(), **TRAIN, group=dist.group.WORLD)
report(**found)
dist.destroy_process_group()
"""


def test_two_gpus(tmp_path: Path) -> None:
    """Parallel models of each kind agree, also after a step; a difference is one error on both; quarantine waits."""
    zero, one = run_ranks(tmp_path, PROGRAM)
    print(f"agree of a 24-layer model on two GPUs with NCCL: {zero['milliseconds']:.2f} ms")
    for name in ("plain", "ddp", "fsdp2", "tp"):
        for rank in (zero, one):
            assert rank[name] == rank[f"{name} after a step"] == ""
        assert zero[f"{name} differs"] == one[f"{name} differs"]
        for part in ("0-23.norm (layer 'Norm')", "rank 0: ", "Fast [", "rank 1: ", "Other ["):
            assert part in zero[f"{name} differs"]
    for rank in (zero, one):
        assert rank["start"] == rank["boundary"] == rank["kernelize"] == ""
        assert rank["out"] == [[False], True]
    assert (zero["waiting"], one["waiting"]) == ([], [True])
