"""The tools that judge kernels, on layers whose parameters another library holds."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels_core import KernelsWarning, use_kernel_forward_from_hub
from kernels_plugins import canary, probing, use_kernel_mapping, verify

SHARDED = """
import os, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from kernels_core import KernelsWarning, quarantined, use_kernel_forward_from_hub
from kernels_plugins import canary, probing, use_kernel_mapping, verify

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=0, world_size=1)
warnings.simplefilter("always")

@use_kernel_forward_from_hub("Sharded")
class Mlp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)
    def forward(self, x):
        return torch.relu(self.linear(x))
class Right(nn.Module):
    def forward(self, x):
        return self.linear(x).relu()
class Wrong(nn.Module):
    def forward(self, x):
        return torch.relu(self.linear(x)) * 1.5

model, x = nn.Sequential(Mlp(8)), torch.randn(2, 8)
fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
for kernel in (Right, Wrong):
    for name, tool in (("canary", canary(first=3, action="quarantine")), ("probing", probing())):
        with warnings.catch_warnings(record=True) as caught, use_kernel_mapping({"Sharded": {"cpu": kernel}}), tool:
            model(x).sum().backward()
        text = " ".join(str(w.message) for w in caught if issubclass(w.category, KernelsWarning))
        print(kernel.__name__, name, "|", text.replace(chr(10), " "))
with use_kernel_mapping({"Sharded": {"cpu": Right}}):
    print("verify |", *verify(model, x, gradients=False).rows)
    model(x).sum().backward()  # FSDP2 gathers and frees as before
    inner = nn.Sequential(Mlp(8))
    fully_shard(inner[0].linear, mesh=init_device_mesh("cpu", (1,)))
    print("inner |", *verify(inner, x).rows)
    inner(x).sum().backward()
dist.destroy_process_group()
"""


def test_tools_on_sharded_layers(tmp_path: Path) -> None:
    """A right kernel is not accused under FSDP2, and a wrong one is found; where none can be compared, it is stated."""
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    assert "reference fails" not in done.stdout
    assert lines["Right canary "].strip() == ""
    assert "instead of" in lines["Wrong canary "] and "quarantine" in lines["Wrong canary "]
    assert "is wrong" not in lines["Right probing "]
    assert "cannot be compared, because" in lines["inner "] or "undecided" not in lines["inner "]
    assert "forward: ok" in lines["verify "] or "cannot be compared, because parameter" in lines["verify "]


class Packed(nn.Parameter):
    """Numbers of eight bits with their scale, as a library for quantization holds them."""

    scale: float

    def __new__(cls, data: torch.Tensor, scale: float = 0.5) -> Packed:
        packed = torch.Tensor._make_subclass(cls, data, False)
        packed.scale = scale
        return packed

    def __deepcopy__(self, memo: object) -> Packed:
        return Packed(self.data.clone(), self.scale)


class Uncopyable(Packed):
    """The same, without a way to copy it."""

    def __deepcopy__(self, memo: object) -> Packed:
        raise RuntimeError("no copy")


@pytest.mark.parametrize("held", [Packed, Uncopyable])
def test_tools_on_parameters_with_attributes(held: type[Packed]) -> None:
    """Kernels are compared on copies with these attributes; where there are none, no fault of the layer is reported."""

    @use_kernel_forward_from_hub(f"Held{held.__name__}")
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = held(torch.ones(4, 4, dtype=torch.uint8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ (self.weight.float() * self.weight.scale))

    class Right(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ (self.weight.float() * self.weight.scale)).relu()

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight.float()).relu()

    layer, x = Layer(), torch.rand(2, 4)
    texts = {}
    for kernel in (Right, Wrong):
        with use_kernel_mapping({f"Held{held.__name__}": {"cpu": kernel}}), torch.no_grad():
            texts[kernel] = str(verify(layer, x, gradients=False))
            for tool in (canary(first=1, action="warn"), probing()):
                with tool, warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", KernelsWarning)
                    layer(x)
                texts[kernel] += " ".join(str(warning.message) for warning in caught)
    assert "reference fails" not in "".join(texts.values())
    if held is Packed:
        assert "wrong" not in texts[Right] and "undecided" not in texts[Right]
        assert "instead of" in texts[Wrong]
    else:
        assert "cannot be compared, because parameter weight is a Uncopyable" in texts[Right]
