"""The plain-torch variant of the bundled kernel repository, against the demo's eager layers."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_layers import DEMO, load, load_reference

from kernels_plugins.demo.bundle import write_bundle
from kernels_plugins.hub.builds.integrity import as_build, check_digest, read_files
from kernels_plugins.hub.builds.metadata import Metadata

BUILD = DEMO / "hub" / "kernels-demo" / "llama-layers" / "build"
LAYERS = ["RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding"]


reference = load_reference("demo_reference_layers_cpu")
kernels = load("demo_kernels_cpu_under_test", BUILD / "torch-cpu").layers


def make(name: str, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor]]:
    """A reference layer and inputs that require gradients."""
    torch.manual_seed(0)
    if name == "RotaryEmbedding":
        q, k = torch.randn(2, 4, 7, 16, dtype=dtype), torch.randn(2, 2, 7, 16, dtype=dtype)
        angles = [torch.randn(1, 7, 16, dtype=dtype) for _ in range(2)]
        return reference.RotaryEmbedding(), [q.requires_grad_(), k.requires_grad_(), *angles]
    layer = getattr(reference, name)(*([100] if name == "RMSNorm" else [])).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, [torch.randn(3, 5, 100, dtype=dtype, requires_grad=True)]


def run(forward: Any, layer: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradients of inputs and parameters."""
    outputs = forward(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in (*inputs, *layer.parameters()) if x.requires_grad]
    return [*outputs, *torch.autograd.grad([y.float().square().sum() for y in outputs], wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the kernel run on the reference layer's own state equal the reference's."""
    layer, inputs = make(name, dtype)
    kernel = types.MethodType(getattr(kernels, name).forward, layer)
    for actual, expected in zip(run(kernel, layer, inputs), run(layer, layer, inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_function_matches_the_layer() -> None:
    """The plain function serves function layers with the same result."""
    _, (x,) = make("SiluAndMul", torch.float32)
    torch.testing.assert_close(kernels.silu_and_mul(x), reference.SiluAndMul()(x))


def test_traces_to_a_full_graph() -> None:
    """The kernel layer compiles without graph breaks, as its `can_torch_compile` promises."""
    layer, inputs = make("RMSNorm", torch.float32)
    expected = layer(*inputs)
    layer.forward = types.MethodType(kernels.RMSNorm.forward, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_stateless(name: str) -> None:
    """Kernel layers add a `forward` and the two capability flags, and no constructor of their own."""
    layer = getattr(kernels, name)
    assert issubclass(layer, torch.nn.Module)
    assert "__init__" not in vars(layer)
    assert layer.has_backward
    assert layer.can_torch_compile


@pytest.mark.parametrize("variant", ["torch-cpu", "torch-cuda"])
def test_builds_are_whole(variant: str, tmp_path: Path) -> None:
    """A build that is written has a digest of each file, and its files import only each other, PyTorch and Triton."""
    folder = write_bundle(tmp_path / "hub") / "kernels-demo" / "llama-layers" / "build" / variant
    metadata = Metadata.from_bytes((folder / "metadata.json").read_bytes())
    files = read_files(folder)
    assert metadata.id.startswith(f"_llama_layers_{variant.removeprefix('torch-')}_")
    assert check_digest(as_build(folder, files)) == f"{len(files) - 1} files, sha256"
    for name in files.keys() - {"metadata.json"}:
        for node in ast.walk(ast.parse(files[name])):
            if isinstance(node, ast.ImportFrom) and node.level:
                modules = [node.module] if node.module else [each.name for each in node.names]
                assert {f"{module}.py" for module in modules} <= files.keys()
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert {str(module).split(".")[0] for module in modules} <= {
                    "torch",
                    "triton",
                    *sys.stdlib_module_names,
                }
