"""Checkpoints of parallel models with kernels: on two GPUs with NCCL, and everywhere by gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

CAN_SHARD = hasattr(torch.cpu.Stream(), "record_event")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not CAN_SHARD, reason="PyTorch 2.6 shards on GPUs only")),
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")),
]

MODEL = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from kernels_plugins import register_kernel_mapping, use_kernel_mapping
warnings.simplefilter("error", KernelsWarning)
kind, phase = os.environ["DEVICE"], os.environ["PHASE"]
device = torch.device(kind, R) if kind == "cuda" else torch.device("cpu")
if kind == "cuda": torch.cuda.set_device(device)
dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[kind],
    init_method="file://" + os.path.abspath(f"store-{phase}"), rank=R, world_size=W)
mesh, ran = init_device_mesh(kind, (W,)), []

def norm(self, x): return nn.functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)
@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))
    def forward(self, x): ran.append("reference"); return norm(self, x)
class Fast(nn.Module):
    local_except = (-1,)
    def forward(self, x): ran.append("Fast"); assert type(x) is torch.Tensor; return norm(self, x)
class Newer(nn.Module):
    local_except = (-1,)
    def forward(self, x): ran.append("Newer"); return 2 * norm(self, x)
class Block(nn.Module):
    again = False
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = Norm(), nn.Linear(64, 128), nn.Linear(128, 64)
    def body(self, x): return x + self.down(self.up(self.norm(x)).relu())
    def forward(self, x):
        if not self.again: return self.body(x)
        return checkpoint(self.body, x, use_reentrant=False, context_fn=checkpoint_scopes)
def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(3))).to(device)
def shard(model):
    for block in model: fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
def parallel(model):
    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1))}
    for block in model: parallelize_module(block, mesh, plan)
    return model
def batch(seed, each=True):
    torch.manual_seed(100 * seed + (R if each else 0))
    return torch.randn(2, 8, 64, device=device)
TRAIN = {"device": device, "mode": Mode.TRAINING}
"""

SAVED = """
def step(model, optimizer, number):
    loss = model(batch(number)).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
if phase == "save":
    register_kernel_mapping({"Norm": {kind: Fast}})
    model = shard(kernelize(make(0), **TRAIN, group=mesh))
else:  # a newer kernel is offered by now, and other weights are there; kernels come after the shards
    register_kernel_mapping({"Norm": {kind: [Newer, Fast]}})
    model = shard(make(1))
    offered = receipt(model, **TRAIN).rows[0].origin
    os.environ["KERNELS_DECISIONS"] = "step/kernels.decisions.json"
    forget()
    kernelize(model, **TRAIN, group=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
weights, state = get_state_dict(model, optimizer)
if phase == "save":
    losses = [step(model, optimizer, number) for number in range(2)]
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id="step")
    if R == 0: receipt(model, **TRAIN).freeze("step/kernels.decisions.json")
    offered = receipt(model, **TRAIN).rows[0].origin
else:
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id="step")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
ran.clear()
report(names=sorted(weights), offered=offered, losses=[step(model, optimizer, number) for number in (2, 3)], ran=ran)
dist.destroy_process_group()
"""

RECOMPUTED = """
found = {}
for name, place in ("fsdp2", shard), ("tensor and sequence parallel", parallel):
    results = []
    for again in False, True:
        model, x = place(make(0)), batch(0, each=place is shard)
        if place is parallel: x = x.chunk(W, 1)[R].contiguous()  # each rank has its part of the sequence
        x.requires_grad_()
        for block in model: block.again = again
        ran.clear()
        with use_kernel_mapping({"Norm": {kind: Fast}}):
            loss = model(x).pow(2).sum()
        loss.backward()  # outside of the scope
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        results.append((list(ran), [loss.detach(), x.grad, *gradients]))
    (plain, expected), (twice, gradients) = results
    found[name] = {"plain": plain, "twice": twice,
        "apart": max(((a - b).abs().max() / (1e-6 + b.abs().max())).item() for a, b in zip(gradients, expected))}
report(**found)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_a_sharded_checkpoint_continues_with_its_kernels(device: str, tmp_path: Path) -> None:
    """A kernelized FSDP2 model is saved and loaded with its decisions: the same kernels, the same losses from then on.

    A newer kernel is offered by then, which computes otherwise; names in the checkpoint are those without kernels.
    """
    saved = run_ranks(tmp_path, MODEL + SAVED, DEVICE=device, PHASE="save")
    loaded = run_ranks(tmp_path, MODEL + SAVED, DEVICE=device, PHASE="load")
    for before, after in zip(saved, loaded, strict=True):
        assert "Newer" in after["offered"] and "Fast" in before["offered"]
        assert before["ran"] == after["ran"] == ["Fast"] * 6
        assert before["names"] == after["names"] and "0.norm.weight" in after["names"]
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_parallel_models_recompute_with_the_kernels_of_their_forward(device: str, tmp_path: Path) -> None:
    """Activation checkpointing and a backward outside of the scope: the kernels run twice, with the same gradients."""
    for report in run_ranks(tmp_path, MODEL + RECOMPUTED, DEVICE=device, PHASE="recompute"):
        assert list(report) == ["fsdp2", "tensor and sequence parallel"]
        for found in report.values():
            assert (found["plain"], found["twice"]) == (["Fast"] * 3, ["Fast"] * 6)
            assert found["apart"] < 1e-5
