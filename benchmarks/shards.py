"""A kernel on the shards of a `DTensor`, beside the same kernel called by hand on the shard.

    torchrun --nproc-per-node 2 benchmarks/shards.py

By hand, the shards are plain tensors, as in a program without `DTensor`. Prints one line
per size: microseconds of a training step (forward and backward) both ways, and their ratio.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

SIZES = ((4, 4096, 4096), (4, 8192, 4096), (2, 8192, 8192))
ROUNDS, STEPS = 15, 20


@use_kernel_forward_from_hub("ShardNorm")
class Norm(nn.Module):
    """The layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Hold the weight."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        rows = hidden_states.float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * rows.to(hidden_states.dtype)


class Kernel(nn.Module):
    """PyTorch's own fused norm."""

    local_except = (-1,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise rows."""
        weight: Any = self.weight
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, cast(Any, self.variance_epsilon))


def step(layer: Any, x: torch.Tensor, gradient: torch.Tensor, *, by_hand: bool) -> None:
    """Run forward and backward."""
    x.grad = layer.weight.grad = None
    output = Kernel.forward(layer, x) if by_hand else layer(x)
    output.backward(gradient)


def main() -> None:
    """Measure both in turn, and print medians of rank 0."""
    gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if gpu:
        torch.cuda.set_device(rank)
    kind: Literal["cpu", "cuda"] = "cuda" if gpu else "cpu"
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for size in SIZES if gpu else ((2, 512, 512),):
        dtype = torch.bfloat16 if gpu else torch.float32
        weight = torch.ones(size[-1], device=kind, dtype=dtype)
        placed = Norm(distribute_tensor(weight, mesh, [Replicate()]))
        x, gradient = (
            distribute_tensor(torch.randn(size, device=kind, dtype=dtype), mesh, [Shard(1)]) for _ in range(2)
        )
        x.requires_grad_()
        assert isinstance(x, DTensor) and isinstance(gradient, DTensor)
        own: torch.Tensor = cast(Any, gradient).to_local()
        hand, shard = Norm(weight.clone()), cast(Any, x.detach()).to_local().clone().requires_grad_()
        cases = {"by hand": (hand, shard, own, True), "DTensor": (placed, x, gradient, False)}
        times: dict[str, list[float]] = {name: [] for name in cases}
        with use_kernel_mapping({"ShardNorm": {kind: Kernel}}):
            for number in range(ROUNDS + 3):
                for name, (layer, given, back, by_hand) in cases.items():
                    if gpu:
                        torch.cuda.synchronize()
                    started = time.perf_counter()
                    for _ in range(STEPS):
                        step(layer, given, back, by_hand=by_hand)
                    if gpu:
                        torch.cuda.synchronize()
                    if number >= 3:
                        times[name].append((time.perf_counter() - started) / STEPS * 1e6)
        if rank == 0:
            ours, theirs = (statistics.median(times[name]) for name in ("DTensor", "by hand"))
            ratio = ours / theirs
            print(f"{size} over {mesh.size()} ranks: by hand {theirs:.1f} us, DTensor {ours:.1f} us, {ratio:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
