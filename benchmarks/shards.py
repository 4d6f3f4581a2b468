"""A kernel on the shards of a `DTensor`, beside the same kernel called by hand on the shard.

    torchrun --nproc-per-node 2 benchmarks/shards.py

By hand means two things. *Plain*: the shards are plain tensors, as in a program without `DTensor`, and the
gradient of the weight is left for the caller to add up. *In a model*: tensors are `DTensor`s, and a user writes
`to_local` and `from_local` around the kernel. Prints the microseconds of a training step (forward and backward) of
each, of a norm alone and of blocks of norm and MLP under tensor and sequence parallelism; and of which the host takes
until all is submitted. *Nothing* is a function of autograd between `DTensor`s without a kernel: what PyTorch takes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

SIZES = ((4, 4096, 4096), (4, 8192, 4096), (1, 8192, 8192), (2, 8192, 8192), (4, 8192, 8192))
BLOCKS = ((1, 2048, 4096), (1, 8192, 4096), (1, 8192, 8192))
ROUNDS, STEPS, BLOCK_STEPS = 15, 20, 4


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


class ByHand(Norm):
    """The kernel on plain tensors."""

    forward = Kernel.forward


class InModel(Norm):
    """The kernel between `to_local` and `from_local`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the rows of the shard."""
        given, weight = cast(DTensor, hidden_states), cast(DTensor, self.weight)
        own = weight.to_local(grad_placements=[Partial()])
        output = nn.functional.rms_norm(given.to_local(), own.shape, own, self.variance_epsilon)
        kept: Any = {"run_check": False, "shape": given.shape, "stride": given.stride()}
        return DTensor.from_local(output, given.device_mesh, given.placements, **kept)


def fresh(tensor: Any) -> Any:
    """Return another `DTensor` of the same shard in the cheapest way that there is: by PyTorch's private names."""
    return cast(Any, DTensor).__new__(DTensor, tensor.to_local().detach(), tensor._spec, requires_grad=False)


class Nothing(torch.autograd.Function):
    """Passes shards on."""

    @staticmethod
    def forward(ctx: Any, given: Any, weight: Any) -> Any:
        """Return the input."""
        ctx.weight = weight
        return fresh(given)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Return gradients of the right shapes."""
        return fresh(gradient), fresh(ctx.weight)


class Block(nn.Module):
    """A norm and an MLP, beside a residual."""

    def __init__(self, norm: nn.Module, width: int, device: str, dtype: torch.dtype) -> None:
        """Make the projections."""
        super().__init__()
        inner, bare = width * 7 // 2, {"bias": False, "device": device, "dtype": dtype}
        self.norm = norm
        self.up, self.down = nn.Linear(width, inner, **bare), nn.Linear(inner, width, **bare)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the residual."""
        return x + cast(torch.Tensor, self.down(nn.functional.silu(self.up(self.norm(x)))))


def measure(title: str, cases: dict[str, Callable[[], None]], steps: int, *, gpu: bool) -> None:
    """Measure all cases in turn, and print medians of rank 0."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(ROUNDS + 3):
        for name, step in cases.items():
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            submitted = time.perf_counter()
            if gpu:
                torch.cuda.synchronize()
            if number >= 3:
                ended = time.perf_counter()
                times[name].append(((ended - started) / steps * 1e6, (submitted - started) / steps * 1e6))
    if dist.get_rank() == 0:
        found = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()
        }
        texts = [f"{name} {whole:.1f} (host {host:.1f})" for name, (whole, host) in found.items()]
        ours = found["DTensor"][0]
        ratios = [f"{ours / found[name][0]:.3f} of {name}" for name in ("plain", "in a model")]
        print(f"{title}: {', '.join(texts)}; DTensor takes {', '.join(ratios)}", flush=True)


def main() -> None:
    """Measure norms, then blocks."""
    gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if gpu:
        torch.cuda.set_device(rank)
    kind: Literal["cpu", "cuda"] = "cuda" if gpu else "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    dist.init_process_group("nccl" if gpu else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size(),))

    def stepping(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
        parameters = list(layer.parameters())

        def step() -> None:
            for each in (x, *parameters):
                each.grad = None
            layer(x).backward(gradient)

        return step

    def norm(size: tuple[int, ...]) -> None:
        weight = torch.ones(size[-1], device=kind, dtype=dtype)
        x, gradient = (
            distribute_tensor(torch.randn(size, device=kind, dtype=dtype), mesh, [Shard(1)]) for _ in range(2)
        )
        x.requires_grad_()
        shard, own = (cast(Any, each.detach()).to_local().clone() for each in (x, gradient))
        layers = [make(distribute_tensor(weight, mesh, [Replicate()])) for make in (InModel, Norm)]
        held = layers[0].weight

        def nothing() -> None:
            x.grad = held.grad = None
            cast(Any, Nothing).apply(x, held).backward(gradient)

        cases = {
            "plain": stepping(ByHand(weight.clone()), shard.requires_grad_(), own),
            "in a model": stepping(layers[0], x, gradient),
            "DTensor": stepping(layers[1], x, gradient),
            "nothing": nothing,
        }
        measure(f"norm of {size} over {mesh.size()} ranks", cases, STEPS, gpu=gpu)

    def blocks(size: tuple[int, ...]) -> None:
        shard, own = (torch.randn(1, size[1] // mesh.size(), size[2], device=kind, dtype=dtype) for _ in range(2))
        cases = {}
        for name, make in (("plain", ByHand), ("in a model", InModel), ("DTensor", Norm)):
            made = [
                Block(make(torch.ones(size[-1], device=kind, dtype=dtype)), size[-1], kind, dtype) for _ in range(4)
            ]
            for each in made:
                plan: dict[str, Any] = {
                    "up": ColwiseParallel(input_layouts=Shard(1)),
                    "down": RowwiseParallel(output_layouts=Shard(1)),
                }
                if name != "plain":
                    plan["norm"] = SequenceParallel()
                parallelize_module(each, mesh, plan)
            cases[name] = stepping(nn.Sequential(*made), shard.clone().requires_grad_(), own)
        measure(f"4 blocks of {size} over {mesh.size()} ranks", cases, BLOCK_STEPS, gpu=gpu)

    with use_kernel_mapping({"ShardNorm": {kind: Kernel}}):
        for size in SIZES if gpu else ((2, 64, 64),):
            norm(size)
        for size in BLOCKS if gpu else ((1, 64, 64),):
            blocks(size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
