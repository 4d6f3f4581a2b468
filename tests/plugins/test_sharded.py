"""The tools that judge kernels, on layers whose parameters another library holds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch import nn

from kernels_core import KernelsWarning, use_kernel_forward_from_hub
from kernels_plugins import canary, probing, use_kernel_mapping, verify

SHARDED = """
import os, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from kernels_core import KernelsWarning, quarantined, release, use_kernel_forward_from_hub
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

mesh, x = init_device_mesh("cpu", (1,)), torch.randn(2, 8)

def whole():
    model = nn.Sequential(Mlp(8))
    fully_shard(model[0], mesh=mesh)
    return model
def child():
    model = nn.Sequential(Mlp(8))
    fully_shard(model[0].linear, mesh=mesh)
    return model
def parallel():
    return parallelize_module(Mlp(8), mesh, {"linear": ColwiseParallel()})
def distributed():
    return parallelize_module(Mlp(8), mesh, {"linear": ColwiseParallel(use_local_output=False)})

sharded = (whole, child) if hasattr(torch.cpu.Stream(), "record_event") else ()  # PyTorch 2.6 shards on GPUs only
for make in (*sharded, parallel, distributed):
    for kernel in (Right, Wrong):
        start = f"{make.__name__} {kernel.__name__}"
        kernel.tensor_subclasses = () if make in sharded else (DTensor,)  # else the reference serves
        for name, tool in (("canary", canary(first=1, action="quarantine")), ("probing", probing())):
            with warnings.catch_warnings(record=True) as caught, use_kernel_mapping({"Sharded": {"cpu": kernel}}), tool:
                model = make()
                model(x.clone().requires_grad_()).sum().backward()
            text = " ".join(str(w.message) for w in caught if issubclass(w.category, KernelsWarning))
            print(start, name, "|", text.replace(chr(10), " "))
            print(start, "quarantine |", *[entry.reason for entry in quarantined()])
            release()
        with use_kernel_mapping({"Sharded": {"cpu": kernel}}):
            model = make()
            print(start, "verify |", *verify(model, x, gradients=make is not whole).rows)
            model(x).sum().backward()  # FSDP2 gathers and frees as before
dist.destroy_process_group()
"""


def test_tools_on_sharded_layers(tmp_path: Path) -> None:
    """No tool accuses a right kernel on a sharded layer, each finds a wrong one or states that it cannot compare."""
    done = run_python("-c", SHARDED, environment=os.environ, folder=tmp_path, compiler=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(" |", 1) for line in done.stdout.splitlines() if " |" in line)
    assert "reference fails" not in done.stdout
    for kind in {line.partition(" ")[0] for line in lines}:
        assert lines[f"{kind} Right quarantine"].strip() == ""
        assert "instead of" in lines[f"{kind} Wrong canary"] and "is in quarantine" in lines[f"{kind} Wrong canary"]
        assert "is wrong" not in lines[f"{kind} Right probing"]
        right, wrong = lines[f"{kind} Right verify"], lines[f"{kind} Wrong verify"]
        assert ": wrong" not in right
        assert ("forward: ok" in right and "forward: wrong" in wrong) or "cannot be compared, because param" in right
    if "child Right canary" in lines:
        assert lines["whole Right canary"].strip() == ""
        assert "its gradients are not compared: it cannot" in lines["child Right canary"]
        assert (
            "undecided" not in lines["child Right verify"]
            or "cannot be compared, because" in lines["child Right verify"]
        )
    assert lines["parallel Right canary"].strip() == ""
    for kind in ("parallel", "distributed"):
        assert "gradient of parameter linear.weight: ok" in lines[f"{kind} Right verify"]
        assert "gradient of parameter linear.weight: wrong" in lines[f"{kind} Wrong verify"]


class Closed(torch.Tensor):
    """A tensor that only leaves a comparison with errors."""

    @classmethod
    def __torch_function__(cls, function: object, types: object, args: Any = (), kwargs: Any = None) -> object:
        if function in (torch.isfinite, torch.Tensor.take, torch.Tensor.to):
            raise NotImplementedError("no such operator")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("made_by", ["reference", "kernel"])
def test_verify_of_outputs_that_cannot_be_compared(made_by: str) -> None:
    """The report states that no numbers are compared, in place of the error of a comparison."""

    @use_kernel_forward_from_hub("ReturnsClosed")
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).as_subclass(Closed if made_by == "reference" else torch.Tensor)

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu().as_subclass(Closed)

    with use_kernel_mapping({"ReturnsClosed": {"cpu": Kernel}}):
        rows = verify(Layer(), torch.ones(2), gradients=False).rows
    assert rows and {row.verdict for row in rows} == {"undecided"}
    assert "no such operator" in rows[0].reason


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
