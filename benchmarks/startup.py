"""The price of a start: imports, and the search for plugins among many distributions."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORT_LIMIT_MS, PLUGINS_LIMIT_MS, DISCOVERY_LIMIT_MS = 40.0, 15.0, 100.0
MODULES_LIMIT = 5
DISTRIBUTIONS = 500
STARTS = 9

IMPORT = """
import gc, json, time
import torch
gc.collect()  # torch's import leaves garbage that is collected at any time: not within the measurement
before = time.perf_counter()
import kernels_core
core = time.perf_counter()
import kernels_plugins
print(json.dumps({"core": (core - before) * 1e3, "plugins": (time.perf_counter() - core) * 1e3}))
"""

MAPPING = """
import json, sys, torch
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import register_kernel_mapping
@use_kernel_forward_from_hub("bench")
class Layer(torch.nn.Module):
    def forward(self, x):
        return x
class Kernel(torch.nn.Module):
    def forward(self, x):
        return x + 1
register_kernel_mapping({"bench": {"cpu": Kernel}})
assert Layer()(torch.zeros(1)) == 1
print(json.dumps({"modules": sum(name.split(".")[0] == "kernels_plugins" for name in sys.modules)}))
"""

DECORATE = """
import gc, json, time
import torch
from kernels_core import use_kernel_forward_from_hub
class Layer(torch.nn.Module):
    def forward(self, x):
        return x
gc.collect()
before = time.perf_counter()
use_kernel_forward_from_hub("bench")(Layer)
print(json.dumps({"ms": (time.perf_counter() - before) * 1e3}))
"""

DISCOVERY = """
import gc, json, os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from kernels_core import Mode, plugin_manager, resolve
folder, scans = sys.argv[1], {"files": 0, "folders": 0}

def audit(event, args):
    if args and isinstance(args[0], str) and args[0].startswith(folder):
        if event in ("os.listdir", "os.scandir"):
            scans["folders"] += 1
        elif event == "open" and args[0].endswith("entry_points.txt"):
            scans["files"] += 1

choice = sys.argv[2]
if choice == "count":  # the hook costs time: count in one process, time in others
    sys.addaudithook(audit)
if choice != "debt":  # torch's import leaves garbage that is collected at any time: not within the measurement
    gc.collect()
before = time.perf_counter()
plugin_manager().plugins()
discovery = time.perf_counter() - before
resolve("bench_nothing", device="cpu", mode=Mode.INFERENCE)
first = dict(scans)
before = time.perf_counter()
resolve("bench_nothing", device="cpu", mode=Mode.TRAINING)
resolve("bench_other", device="cpu", mode=Mode.INFERENCE)
answer = {"discovery": discovery * 1e3, "second": (time.perf_counter() - before) * 500, "first": first}
answer["again"] = {key: scans[key] - first[key] for key in scans}
print(json.dumps(answer))
"""


def run() -> Iterator[Row]:
    """Start fresh interpreters: with bytecode caches, after one start that is not counted."""
    imports = [_start(IMPORT) for _ in range(STARTS + 1)][1:]
    core, plugins = (statistics.median(times[name] for times in imports) for name in ("core", "plugins"))
    yield Row("startup", "import kernels_core after import torch", core, "ms", limit=IMPORT_LIMIT_MS)
    yield Row("startup", "import kernels_plugins after import kernels_core", plugins, "ms", limit=PLUGINS_LIMIT_MS)
    modules = _start(MAPPING, KERNELS_PLUGINS="mapping")["modules"]
    yield Row("startup", "modules of kernels_plugins that a mapped call loads", modules, "modules", limit=MODULES_LIMIT)
    decorating = [_start(DECORATE)["ms"] for _ in range(3)]
    yield Row("startup", "decorating the first class", statistics.median(decorating), "ms")
    with tempfile.TemporaryDirectory() as folder:
        make_distributions(Path(folder))
        few = [_start(DISCOVERY, "/nowhere", "time") for _ in range(STARTS)]
        many = [_start(DISCOVERY, folder, "time", path=folder) for _ in range(STARTS + 1)][1:]
        debt = [_start(DISCOVERY, folder, "debt", path=folder) for _ in range(3)]
        counted = _start(DISCOVERY, folder, "count", path=folder)
    here = statistics.median(answer["discovery"] for answer in few)
    yield Row("startup", "plugin discovery, this environment", here, "ms", limit=DISCOVERY_LIMIT_MS)
    yield Row(
        "startup",
        f"plugin discovery, {DISTRIBUTIONS} distributions more",
        statistics.median(answer["discovery"] for answer in many),
        "ms",
        "this environment",
        here,
        DISCOVERY_LIMIT_MS,
    )
    yield Row(
        "startup",
        "the same, where the garbage of importing torch is collected meanwhile",
        statistics.median(answer["discovery"] for answer in debt),
        "ms",
    )
    first, again = counted["first"], counted["again"]
    yield Row("startup", "entry_points.txt read by the first resolution", first["files"], "reads", limit=DISTRIBUTIONS)
    yield Row("startup", "folder scans and reads by two more resolutions", sum(again.values()), "scans", limit=0)
    yield Row("startup", "one more resolution by name", statistics.median(a["second"] for a in many) * 1e3, "us")


def make_distributions(folder: Path) -> None:
    """Write distributions as an installer leaves them."""
    for index in range(DISTRIBUTIONS):
        name = f"bench_distribution_{index}"
        info = folder / f"{name}-1.{index}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: 1.{index}\nSummary: nothing\n"
            "Requires-Dist: torch>=2.6\n\n" + "A long description.\n" * 100
        )
        (info / "entry_points.txt").write_text(
            f"[console_scripts]\n{name} = {name}.cli:main\n\n[{name}.plugins]\nfirst = {name}.first:Plugin\n"
        )
        (info / "RECORD").write_text("".join(f"{name}/file_{i}.py,sha256=AAAA,{i}\n" for i in range(40)))
        (info / "INSTALLER").write_text("pip\n")


def _start(program: str, *arguments: str, path: str = "", **variables: str) -> dict[str, Any]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, **variables}
    paths = [path, str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
