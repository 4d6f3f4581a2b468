"""The process that runs the benchmarks of a kernel: code of its publisher, with the rights of the user.

A script has classes that derive from `kernels.benchmark.Benchmark` of the library `kernels`. Each method
`benchmark_NAME` is a workload; `setup_NAME`, or `setup`, makes its tensors, and `verify_NAME` returns the tensor that
`self.out` has to be near. A line of JSON goes to the parent for each workload.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import functions
from .scripts import FOLDER

_MODULE = "benchmark_module"  # the name under which `kernels` runs a script
_TOLERANCE = 1e-2  # the absolute one of `kernels`


class Benchmark:
    """The base class, where the library `kernels` is not installed."""

    seed: int | None = None
    device: str = "cpu"

    def __init__(self) -> None:
        self.kernel: Any = None
        self.out: Any = None

    def setup(self) -> None:
        """Make the tensors of workloads that have no `setup_NAME`."""


def base_class() -> type[Any]:
    """Return the class that benchmarks derive from: that of the library, or ours under its name."""
    try:
        return importlib.import_module("kernels.benchmark").Benchmark  # type: ignore[no-any-return]
    except ImportError:
        package, module = types.ModuleType("kernels"), types.ModuleType("kernels.benchmark")
        package.__path__ = []
        package.Benchmark = module.Benchmark = Benchmark  # type: ignore[attr-defined]
        sys.modules.update({"kernels": package, "kernels.benchmark": module})
        return Benchmark


def find_classes(path: Path, digest: str, base: type[Any]) -> list[type[Any]]:
    """Run a script, from the bytes that were checked, and return the benchmarks that it defines."""
    source = path.read_bytes()
    if hashlib.sha256(source).hexdigest() != digest:
        raise ValueError(f"{path.name} was changed since it was checked: run the command again")
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module
    exec(compile(source, str(path), "exec"), vars(module))
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base)]
    return [one for one in found if one.__module__ == _MODULE]


def run_class(benchmark: type[Any], kernel: Any, device: str, iterations: int, warmup: int) -> Iterator[dict[str, Any]]:
    """Measure the workloads of a class, and yield a result for each."""
    for method in sorted(name for name in dir(benchmark) if name.startswith("benchmark_")):
        workload = method.removeprefix("benchmark_")
        result: dict[str, Any] = {"workload": f"{benchmark.__name__}.{workload}"}
        try:
            result |= _run(benchmark, workload, kernel, device, iterations, warmup)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        yield result


def _run(benchmark: type[Any], workload: str, kernel: Any, device: str, iterations: int, warmup: int) -> dict[str, Any]:
    instance = benchmark()
    instance.kernel, instance.device = kernel, device
    if instance.seed is not None:
        torch.manual_seed(instance.seed)  # of all devices
        random.seed(instance.seed)
    getattr(instance, f"setup_{workload}", instance.setup)()
    call, verify = getattr(instance, f"benchmark_{workload}"), getattr(instance, f"verify_{workload}", None)
    result: dict[str, Any] = {"verified": None}
    if verify is not None:
        call()
        _synchronize()
        # Before the measurement: a workload may write to its inputs.
        result["verified"] = bool(torch.allclose(instance.out, verify(), atol=_TOLERANCE))
        result["reference"] = _timings(verify, iterations, warmup)
    return {**result, "timingResults": _timings(call, iterations, warmup)}


def _timings(call: Callable[[], object], iterations: int, warmup: int) -> dict[str, Any]:
    """Return the times of calls in ms, each until the device is done, with the names that `kernels` gives them."""
    times = []
    for number in range(warmup + iterations):
        start = time.perf_counter()
        call()
        _synchronize()
        if number >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    spread = 1.5 * (high - low)
    return {
        "mean_ms": statistics.fmean(times),
        "std_ms": statistics.pstdev(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "q1_ms": low,
        "q3_ms": high,
        "iqr_ms": high - low,
        "outliers": sum(not low - spread <= one <= high + spread for one in times),
        "iterations": iterations,
    }


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main(task: dict[str, Any]) -> None:
    """Run the scripts of a task, and write a line for each workload."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of scripts, also of native code, goes to standard error
    folder = Path(task["folder"])
    if task["request"] is None:
        kernel: Any = functions.get_local_kernel(folder)
    else:
        kernel = functions.get_kernel(**task["request"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator is not None else "cpu"
    base = base_class()
    os.chdir(folder)  # scripts read files beside them
    for name, digest in task["digests"].items():
        for benchmark in find_classes(folder / FOLDER / name, digest, base):
            for result in run_class(benchmark, kernel, device, task["iterations"], task["warmup"]):
                stream.write(json.dumps(result) + "\n")
                stream.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
