"""Times the demo's Triton kernels against copying, torch, the compiled and the eager reference.

Run on an NVIDIA GPU, with the project installed or its root on PYTHONPATH:
`python benchmarks/bench_demo_kernels.py [--only CASE] [--json FILE]`.

Every time is a median in microseconds with a cold L2 cache. "launched" times an eager call, whose host work shows
where the kernels are short; "graph" replays the call from a CUDA graph, so only the GPU's own time is left.
"copy" copies a tensor of such a size that it moves the bytes the operation must move at least.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from torch.nn import functional

from kernels_core.dispatch import dispatched_layer
from kernels_plugins.demo.bundle import write_bundle

DEMO = Path(__file__).resolve().parents[1] / "kernels_plugins" / "demo"
FOLDER = tempfile.TemporaryDirectory(prefix="benchmark-demo-")
VARIANT = write_bundle(Path(FOLDER.name, "hub")) / "kernels-demo" / "llama-layers" / "build" / "torch-cuda"
DTYPE = torch.bfloat16


def load(name: str, path: Path) -> Any:
    """Imports the package folder or file `path` as `name`."""
    init = path / "__init__.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location(
        name, init, submodule_search_locations=[str(path)] if path.is_dir() else None
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_reference(name: str) -> Any:
    """The demo's layers as `name`, undecorated: no installed plugin may serve what is compared against."""
    module = load(name, DEMO / "layers.py")
    for cls in (getattr(module, layer) for layer in module.__all__):
        layer = dispatched_layer(cls.forward)
        cls.forward = layer.reference if layer is not None else cls.forward
    return module


def median(call: Callable[[], Any]) -> float:
    """Median microseconds of `call` with a cold L2 cache."""
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median") * 1e3


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """A replay of `call` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host(call: Callable[[], Any], count: int = 500) -> float:
    """Microseconds that one of many calls in a row takes, which for tiny inputs is the host's work."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e6


def fresh(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` compiled apart from everything compiled before, for the shapes at hand."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


def forward_backward(call: Callable[..., Any], inputs: list[torch.Tensor], layer: torch.nn.Module) -> Callable[[], Any]:
    """A call that computes the outputs and the gradients of all inputs and parameters that require them."""
    with torch.no_grad():
        outputs = call(*inputs)
    grads = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    wanted = [x for x in (*inputs, *layer.parameters()) if x.requires_grad]

    def run() -> Any:
        return torch.autograd.grad(call(*inputs), wanted, grads)

    return run


@dataclass
class Case:
    """A layer on inputs, with the bytes that its forward and backward have to move at least."""

    name: str
    layer: torch.nn.Module
    inputs: list[torch.Tensor]
    forward_bytes: int
    backward_bytes: int

    def providers(self, kernels: Any) -> dict[str, Callable[[], Callable[..., Any]]]:
        """Makers of everything that computes the layer."""
        layer = self.layer
        ours = types.MethodType(getattr(kernels, type(layer).__name__).forward, layer)
        providers = {"ours": lambda: ours, "ours compiled": lambda: fresh(ours)}
        if hasattr(layer, "weight"):
            weight = layer.weight
            providers["torch rms_norm"] = lambda: lambda x: functional.rms_norm(x, weight.shape, weight, 1e-6)
        return providers | {"compiled reference": lambda: fresh(layer), "eager reference": lambda: layer}


def tensor(*shape: int, grad: bool = True) -> torch.Tensor:
    """Random values on the GPU."""
    return torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=grad)


def cases(reference: Any) -> Iterator[Case]:
    """What is timed; inputs are made when it is their turn."""
    rows, hidden, inner = 8192, 4096, 14336
    size = 2 * rows * hidden
    norm = reference.RMSNorm(hidden).to("cuda", DTYPE)
    yield Case(f"RMSNorm {rows}x{hidden}", norm, [tensor(rows, hidden)], 2 * size, 3 * size)
    size = 2 * rows * inner
    for name, layer in (("silu-and-mul", reference.SiluAndMul()), ("gelu-and-mul", reference.GeluAndMul())):
        yield Case(f"{name} {rows}x{inner}", layer, [tensor(rows, 2 * inner)], 3 * size, 5 * size)
    heads = [tensor(4, 32, 2048, 128) for _ in range(2)]
    angles = [tensor(1, 2048, 128, grad=False) for _ in range(2)]
    size = 4 * heads[0].nbytes
    yield Case("rotary q, k [4, 32, 2048, 128]", reference.RotaryEmbedding(), heads + angles, size, size)


def measure(reference: Any, kernels: Any, only: str) -> Iterator[dict[str, Any]]:
    """The rows of the table, for cases whose names contain `only`."""
    for case in cases(reference):
        if only not in case.name:
            continue
        for backward in (False, True):
            size = case.forward_bytes + backward * case.backward_bytes
            source = torch.randint(256, (size // 2,), dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            floor = median(partial(target.copy_, source))
            row = {"case": case.name, "direction": "forward+backward" if backward else "forward"}
            yield row | {"provider": "copy", "launched_us": floor, "graph_us": floor, "graph_over_copy": 1.0}
            del source, target
            for name, make in case.providers(kernels).items():
                with torch.set_grad_enabled(backward):
                    call = make()
                    run = partial(call, *case.inputs)
                    if backward:
                        run = forward_backward(call, case.inputs, case.layer)
                    launched, graph = median(run), median(graphed(run))
                times = {"launched_us": launched, "graph_us": graph, "graph_over_copy": graph / floor}
                yield row | {"provider": name} | times
                torch.cuda.empty_cache()


def measure_host(reference: Any, kernels: Any) -> Iterator[dict[str, Any]]:
    """Host time per call for an input so small that the GPU is never the bottleneck."""
    layer = reference.RMSNorm(4096).to("cuda", DTYPE)
    case = Case("RMSNorm 16x4096", layer, [tensor(16, 4096)], 0, 0)
    for name, make in case.providers(kernels).items():
        with torch.no_grad():
            call = make()
            forward = host(partial(call, *case.inputs))
        both = host(forward_backward(make(), case.inputs, layer))
        yield {"case": case.name, "provider": name, "forward_us": forward, "forward_backward_us": both}


def main() -> None:
    """Prints the tables and optionally writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    parser.add_argument("--only", default="", metavar="CASE", help="leave out cases whose names do not contain this")
    arguments = parser.parse_args()
    setting = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "dtype": str(DTYPE),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    reference = load_reference("bench_reference_layers")
    kernels = load("bench_demo_kernels_cuda", VARIANT).layers
    rows, hosts = list(measure(reference, kernels, arguments.only)), list(measure_host(reference, kernels))
    print(f"\n{'case':31} {'direction':17} {'provider':19} {'launched':>9} {'graph':>9} {'graph/copy':>11}")
    for row in rows:
        times = f"{row['launched_us']:9.1f} {row['graph_us']:9.1f} {row['graph_over_copy']:11.2f}"
        print(f"{row['case']:31} {row['direction']:17} {row['provider']:19} {times}")
    print(f"\n{'host time per eager call':31} {'provider':19} {'forward':>9} {'fwd+bwd':>9}")
    for row in hosts:
        print(f"{row['case']:31} {row['provider']:19} {row['forward_us']:9.1f} {row['forward_backward_us']:9.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows, "host": hosts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
