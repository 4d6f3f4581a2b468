"""Times the demo's Triton kernels against copying, torch, the compiled and the eager reference.

Run on an NVIDIA GPU: `python benchmarks/bench_demo_kernels.py [--json FILE]`.

Every time is a median in microseconds with a cold L2 cache. "launched" times an eager call, whose host work shows
where the kernels are short; "graph" replays the call from a CUDA graph, so only the GPU's own time is left.
"copy" copies a tensor of such a size that it moves the bytes the operation must move at least.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.testing

DEMO = Path(__file__).resolve().parents[1] / "kernels_plugins" / "demo"
VARIANT = DEMO / "hub" / "kernels-demo" / "llama-layers" / "build" / "torch-cuda"
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


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` compiled apart from every other one, for the shapes at hand."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


def forward_backward(call: Callable[..., Any], inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """A call that computes outputs and the gradients of all inputs that require them."""
    with torch.no_grad():
        outputs = call(*inputs)
    grads = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
    wanted = [x for x in inputs if x.requires_grad]

    def run() -> Any:
        return torch.autograd.grad(call(*inputs), wanted, grads)

    return run


def cases(reference: Any, kernels: Any) -> list[tuple[str, dict[str, Callable[..., Any]], list[torch.Tensor], int, int]]:
    """Name, providers, inputs, and the bytes that forward and backward must move at least, of every case."""

    def tensor(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(shape, dtype=DTYPE, device="cuda", requires_grad=grad)

    def layer_call(name: str, source: Any, layer: Any) -> Callable[..., Any]:
        return types.MethodType(getattr(source, name).forward, layer)

    def providers(name: str, layer: Any) -> dict[str, Callable[..., Any]]:
        ours, eager = layer_call(name, kernels, layer), layer_call(name, reference, layer)
        return {"ours": ours, "compiled reference": eager, "eager reference": eager}

    norm = types.SimpleNamespace(variance_epsilon=1e-6)

    def with_weight(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            norm.weight = weight
            return call(x)

        return run

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    rows, hidden, inner = 8192, 4096, 14336
    x, gate = rows * hidden * 2, rows * inner * 2
    norms = {name: with_weight(call) for name, call in providers("RMSNorm", norm).items()}
    norms = {"ours": norms.pop("ours"), "torch rms_norm": rms_norm, **norms}
    q = 4 * 32 * 2048 * 128 * 2
    return [
        (f"RMSNorm {rows}x{hidden}", norms, [tensor(rows, hidden), tensor(hidden)], 2 * x, 3 * x),
        (f"silu-and-mul {rows}x{inner}", providers("SiluAndMul", None), [tensor(rows, 2 * inner)], 3 * gate, 5 * gate),
        (f"gelu-and-mul {rows}x{inner}", providers("GeluAndMul", None), [tensor(rows, 2 * inner)], 3 * gate, 5 * gate),
        (
            "rotary q, k [4, 32, 2048, 128]",
            providers("RotaryEmbedding", None),
            [tensor(4, 32, 2048, 128), tensor(4, 32, 2048, 128), *(tensor(1, 2048, 128, grad=False) for _ in "cs")],
            4 * q,
            4 * q,
        ),
    ]


def measure() -> list[dict[str, Any]]:
    """All rows of the table."""
    reference = load("bench_reference_layers", DEMO / "layers.py")
    kernels = load("bench_demo_kernels_cuda", VARIANT).layers
    rows = []
    for case, providers, inputs, forward, backward in cases(reference, kernels):
        for direction, size in (("forward", forward), ("forward+backward", forward + backward)):
            source = torch.randint(256, (size // 2,), dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            calls = {"copy": lambda s=source, t=target: t.copy_(s)}
            for name, provider in providers.items():
                call = compiled(provider) if name == "compiled reference" else provider
                if direction == "forward":
                    detached = [x.detach() for x in inputs]
                    calls[name] = lambda c=call, i=detached: c(*i)
                else:
                    calls[name] = forward_backward(call, inputs)
            floor = math.nan
            for name, call in calls.items():
                launched, graph = median(call), median(graphed(call))
                floor = graph if name == "copy" else floor
                row = {"case": case, "direction": direction, "provider": name, "launched_us": launched}
                rows.append(row | {"graph_us": graph, "graph_over_copy": graph / floor})
                torch.cuda.empty_cache()
    return rows


def measure_host() -> list[dict[str, Any]]:
    """Host time per call for an input so small that the GPU never is the bottleneck."""
    reference = load("bench_reference_layers_small", DEMO / "layers.py")
    kernels = load("bench_demo_kernels_cuda_small", VARIANT).layers
    rows = []
    for case, providers, inputs, *_ in cases(reference, kernels)[:1]:
        small = [inputs[0].detach()[:16].clone().requires_grad_(), inputs[1]]
        detached = [x.detach() for x in small]
        for name, provider in providers.items():
            call = compiled(provider) if name == "compiled reference" else provider
            rows.append(
                {
                    "case": case.replace("8192", "16"),
                    "provider": name,
                    "forward_us": host(lambda c=call, i=detached: c(*i)),
                    "forward_backward_us": host(forward_backward(call, small)),
                }
            )
    return rows


def main() -> None:
    """Prints the tables and optionally writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
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
    rows, hosts = measure(), measure_host()
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
