"""Properties of numbers, found out bit by bit, of the kernels that come with kernels-core and of those around it.

`python benchmarks/numerics.py` prints a table in Markdown for the first GPU, else the CPU, and the smallest input that
shows each "no". `--device cpu` chooses the device, `--quick` takes small layers and leaves out what compiles,
`--every-size` tries every number of rows, `--only TEXT ...` takes the layers with such a text in their names, and
`--packs NAME ...` the kernels of these packs, without the demo's.
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
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_core import NUMERICS, use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping
from kernels_plugins.adoption.shipped import RULES
from kernels_plugins.adoption.shipped_parents import PARENT_RULES
from kernels_plugins.demo.bundle import write_bundle
from kernels_plugins.demo.layers import GeluAndMul, RMSNorm, RotaryEmbedding, SiluAndMul

PACKS = ("torch", "triton", "liger", "inductor")
WORDS = {"ok": "yes", "wrong": "**no**", "undecided": "not known"}


ORACLES = {rule.layer_name: rule.fuses or rule.oracle for rule in (*RULES, *PARENT_RULES)}
"""By layer name, the plain PyTorch that the rules of adoption compare with."""

Call = tuple[str, nn.Module | Callable[..., Any], tuple[Any, ...]]
"""A title, the layer, and its arguments."""


def reference(name: str, **parts: Any) -> Any:
    """Return a layer of a name as its rule describes it, with the attributes that its oracle reads."""
    if name.startswith(("rotary", "add", "linear")):
        return use_kernel_forward_from_hub(name)(ORACLES[name])
    module = use_kernel_forward_from_hub(name)(type(name, (nn.Module,), {"forward": ORACLES[name]}))()
    for attribute, value in parts.items():
        setattr(module, attribute, value)
    return module


@use_kernel_forward_from_hub("RMSNorm")
class TorchNorm(nn.RMSNorm):
    """PyTorch's own operator as a reference."""

    variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise rows."""
        return functional.rms_norm(hidden_states, self.normalized_shape, self.weight, 1e-6)


@use_kernel_forward_from_hub("scaled_dot_product_attention")
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend, in three operations."""
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value


def subjects(device: str, quick: bool) -> Iterator[Call]:
    """Yield layers as a Llama of 8 billion parameters has them, with inputs of 64 rows; smaller ones on a CPU."""
    small = quick or device == "cpu"
    hidden, inner, heads, words = (256, 512, 4, 512) if small else (4096, 14336, 32, 32000)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def weight() -> nn.Parameter:
        return nn.Parameter(rows(hidden))

    x, gates = rows(2, 32, hidden), rows(2, 32, 2 * inner)
    norm = RMSNorm(hidden)
    nn.init.normal_(norm.weight)
    yield f"RMSNorm, {hidden}", norm, (x,)
    yield f"`torch` rms_norm, {hidden}", TorchNorm(hidden), (x,)
    yield f"RMSNormOffset, {hidden}", reference("RMSNormOffset", weight=weight(), variance_epsilon=1e-6), (x,)
    yield f"LayerNorm, {hidden}", reference("LayerNorm", weight=weight(), bias=weight(), eps=1e-6), (x,)
    for name in ("add_rms_norm", "add_rms_norm_offset"):
        module = reference(name.replace("add_rms_norm_offset", "RMSNormOffset").replace("add_rms_norm", "RMSNorm"))
        module.weight, module.variance_epsilon = weight(), 1e-6
        yield f"{name}, {hidden}", reference(name), (x, rows(*x.shape), module.weight, 1e-6, module)
    yield f"SiluAndMul, {inner}", SiluAndMul(), (gates,)
    yield f"GeluAndMul, {inner}", GeluAndMul(), (gates,)
    yield f"GeluTanhAndMul, {inner}", reference("GeluTanhAndMul"), (gates,)
    yield f"GeluTanh, {inner}", reference("GeluTanh"), (gates,)
    q, k, cos, sin = rows(2, heads, 16, 128), rows(2, heads // 4, 16, 128), *rows(2, 2, 16, 128)
    yield "RotaryEmbedding, 128", RotaryEmbedding(), (q, rows(*q.shape), cos, sin)
    yield "rotary_pos_emb, 128", reference("rotary_pos_emb"), (q, k, cos, sin)
    yield "rotary_pos_emb_partial, 64 of 128", reference("rotary_pos_emb_partial"), (q, k, cos[..., :64], sin[..., :64])
    yield "rotary_pos_emb_half, 128", reference("rotary_pos_emb_half"), (q, k, cos[..., :64], sin[..., :64])
    seen = (q[0].transpose(0, 1), q[1].transpose(0, 1), cos[0], sin[0])
    yield "rotary_pos_emb_vision, 128", reference("rotary_pos_emb_vision"), seen
    yield "scaled_dot_product_attention, 128", attention, (q, rows(*q.shape), rows(*q.shape))
    for name in ("SwiGLUMLP", "GeGLUMLP", "GeGLUTanhMLP", "PackedSwiGLUMLP"):
        projections = {"gate_up_proj": 2} if name.startswith("Packed") else {"gate_proj": 1, "up_proj": 1}
        parts: dict[str, nn.Module] = {
            part: nn.Linear(hidden, times * inner, bias=False) for part, times in projections.items()
        }
        parts["down_proj"] = nn.Linear(inner, hidden, bias=False)
        yield f"{name}, {hidden} to {inner}", reference(name, **parts), (x,)
    labels = torch.randint(0, words, (64,), device=device)
    loss = (rows(64, hidden), nn.Parameter(rows(words, hidden)), None, labels, None, -100)
    yield f"linear_cross_entropy, {hidden} to {words}", reference("linear_cross_entropy"), loss


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


def judged(
    device: str, quick: bool, every_size: bool, only: list[str], named: list[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield layer, implementation, and the row of the report for each property."""
    from kernels_plugins.oracle.subject import Plan
    from kernels_plugins.oracle.verify import verify_each

    names = NUMERICS[:2] if quick else NUMERICS
    plan = Plan(numerics=names, every_size=every_size, compare=False)
    demo = {} if named else demo_kernels(device)
    for title, module, inputs in subjects(device, quick):
        if not any(text in title for text in only):
            continue
        if isinstance(module, nn.Module):
            module = module.to(device, inputs[0].dtype).requires_grad_(True)
        name = "RMSNorm" if isinstance(module, TorchNorm) else title.partition(",")[0]
        packs = () if isinstance(module, TorchNorm) else tuple(f"pack:{pack}" for pack in named or PACKS)
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
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--packs", nargs="*", choices=PACKS, default=[])
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
        chosen.device, chosen.quick, chosen.every_size, chosen.only, chosen.packs
    ):  # at once: a later kernel may end the process
        verdicts = " | ".join(WORDS[properties[name].verdict] for name in names)
        print(f"| {title} | {label} | {verdicts} |", flush=True)
        reasons += [f"- {title}, {label}, `{n}`: {properties[n].reason}" for n in names if properties[n].reason]
    print("", *reasons, sep="\n")


if __name__ == "__main__":
    main()
