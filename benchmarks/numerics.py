"""Properties of numbers, found out bit by bit, of the kernels that come with kernels-core and of those around it.

`python benchmarks/numerics.py` prints a table in Markdown for the first GPU, else the CPU, and the smallest input that
shows each "no". `--device cpu` chooses the device, `--quick` takes small layers and leaves out what compiles,
`--every-size` tries every number of rows, and `--only TEXT` takes the layers with a text in their names.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import NUMERICS, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
from kernels_plugins.demo.bundle import write_bundle
from kernels_plugins.demo.layers import GeluAndMul, RMSNorm, RotaryEmbedding, SiluAndMul

PACKS = ("torch", "triton", "liger", "inductor")
WORDS = {"ok": "yes", "wrong": "**no**", "undecided": "not known"}


@use_kernel_forward_from_hub("SwiGLUMLP")
class SwiGLUMLP(nn.Module):
    """The MLP of a Llama."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Project, gate, project."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@use_kernel_forward_from_hub("RMSNorm")
class TorchNorm(nn.RMSNorm):
    """PyTorch's own operator as a reference."""

    variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise rows."""
        return functional.rms_norm(hidden_states, self.normalized_shape, self.weight, 1e-6)


def subjects(device: str, quick: bool) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Yield layers as a Llama of 8 billion parameters has them, with inputs of 64 rows; smaller ones on a CPU."""
    small = quick or device == "cpu"
    hidden, inner, heads = (256, 512, 4) if small else (4096, 14336, 32)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    norm = RMSNorm(hidden)
    nn.init.normal_(norm.weight)
    yield f"RMSNorm, {hidden}", norm, (rows(64, hidden),)
    yield f"`torch` rms_norm, {hidden}", TorchNorm(hidden), (rows(64, hidden),)
    yield f"SiluAndMul, {inner}", SiluAndMul(), (rows(64, 2 * inner),)
    yield f"GeluAndMul, {inner}", GeluAndMul(), (rows(64, 2 * inner),)
    angles = rows(2, 2, 16, 128)
    yield "RotaryEmbedding, 128", RotaryEmbedding(), (rows(2, heads, 16, 128), rows(2, heads, 16, 128), *angles)
    yield f"SwiGLUMLP, {hidden} to {inner}", SwiGLUMLP(hidden, inner), (rows(64, hidden),)


def demo_kernels(device: str) -> dict[str, Any]:
    """Import the demo's kernels from their build."""
    builds = write_bundle(Path(tempfile.mkdtemp()) / "hub") / "kernels-demo/llama-layers/build"
    folder, package = builds / f"torch-{device}", f"numerics_demo_{device}"
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module.layers, name) for name in ("RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding")}


def judged(device: str, quick: bool, every_size: bool, only: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield layer, implementation, and the row of the report for each property."""
    from kernels_plugins.oracle.subject import Plan
    from kernels_plugins.oracle.verify import verify_each

    names = NUMERICS[:2] if quick else NUMERICS
    plan = Plan(numerics=names, every_size=every_size, compare=False)
    demo = demo_kernels(device)
    for title, module, inputs in subjects(device, quick):
        if only not in title:
            continue
        module = module.to(device, inputs[0].dtype).requires_grad_(True)
        name = type(module).__name__ if not isinstance(module, TorchNorm) else "RMSNorm"
        packs = () if isinstance(module, TorchNorm) else tuple(f"pack:{pack}" for pack in PACKS)
        kernels = [*([demo[name]] if name in demo and packs else []), *packs]
        found: dict[str, dict[str, Any]] = {}
        started = time.perf_counter()
        with use_kernel_mapping({name: {device: kernels}} if kernels else {}, inherit_mapping=False):
            for row in verify_each(module, inputs, {}, plan):
                if row.case == "numerics":
                    label = row.kernel or "reference"
                    label = "the demo's" if "numerics_demo" in label else label.removesuffix(f":{name}")
                    found.setdefault(label, {})[row.subject] = row
        print(f"{title}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        for label, properties in found.items():
            yield title, label, properties


def versions(device: str) -> str:
    """Return the machine, the date and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = [name, f"{datetime.date.today()}", f"Python {platform.python_version()}", f"PyTorch {torch.__version__}"]
    for package in ("triton", "liger-kernel"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Judge, and print the table with the reasons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--every-size", action="store_true")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    os.environ["KERNELS_CACHE"] = tempfile.mkdtemp()  # findings of an earlier run would be taken for new ones
    torch.manual_seed(0)
    names = NUMERICS[:2] if chosen.quick else NUMERICS
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the pack `inductor` compiles many kinds of calls
    print(f"\n{versions(chosen.device)}\n")
    print(f"| Layer | Implementation | {' | '.join(f'`{name}`' for name in names)} |")
    print("|---" * (2 + len(names)) + "|")
    reasons = []
    for title, label, properties in judged(
        chosen.device, chosen.quick, chosen.every_size, chosen.only
    ):  # at once: a later kernel may end the process
        verdicts = " | ".join(WORDS[properties[name].verdict] for name in names)
        print(f"| {title} | {label} | {verdicts} |", flush=True)
        reasons += [f"- {title}, {label}, `{n}`: {properties[n].reason}" for n in names if properties[n].reason]
    print("", *reasons, sep="\n")


if __name__ == "__main__":
    main()
