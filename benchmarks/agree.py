"""The price of `agree`: a model of 24 layers, in processes of gloo on this machine, or of NCCL with `--cuda`.

python benchmarks/agree.py [--ranks 2] [--cuda]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from kernels_core import Mode, agree, use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping

LAYERS, REPEATS = 24, 50


@use_kernel_forward_from_hub("Norm")
class Norm(nn.Module):
    """A layer with a kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x


@use_kernel_forward_from_hub("MLP")
class MLP(Norm):
    """Another layer with a kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x


@use_kernel_forward_from_hub("rotary")
def rotary(x: torch.Tensor) -> torch.Tensor:
    """Return the input: a function that each block calls."""
    return x


class Fast(nn.Module):
    """The kernel of both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x


class Block(nn.Module):
    """As in a Llama: two norms, an MLP, attention with a rotary function and four projections."""

    def __init__(self) -> None:
        """Make the parts."""
        super().__init__()
        self.norms, self.mlp = nn.ModuleList([Norm(), Norm()]), MLP()
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run all of them."""
        return cast(torch.Tensor, self.mlp(self.norms[1](rotary(self.norms[0](x)))))


def measure(rank: int, world: int, store: str, cuda: bool, found: multiprocessing.SimpleQueue[list[float]]) -> None:
    """Time `agree` on one rank; the first one reports."""
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    kernels: dict[str, Any] = {"Norm": Fast, "MLP": Fast, "rotary": lambda x: x}
    register_kernel_mapping({name: {cast(Any, device.type): kernel} for name, kernel in kernels.items()})
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(device)
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        rows = agree(model, device=device, mode=Mode.TRAINING).rows
        times.append(1e3 * (time.perf_counter() - start))
    assert len(rows) == 4 * LAYERS
    if rank == 0:
        found.put(times)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks and print the times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cuda", action="store_true")
    arguments = parser.parse_args()
    found = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = arguments.ranks, f"{folder}/store", arguments.cuda, found
        cast(Any, multiprocessing).spawn(measure, given, nprocs=arguments.ranks)
        times = found.get()
    group = "NCCL" if arguments.cuda else "gloo"
    print(
        f"agree, {LAYERS} blocks of 4 layers, {arguments.ranks} ranks of {group}, torch {torch.__version__}: "
        f"first {times[0]:.1f} ms, then median {statistics.median(times[1:]):.2f} ms, "
        f"fastest {min(times):.2f} ms, slowest {max(times[1:]):.2f} ms"
    )


if __name__ == "__main__":
    main()
