"""The command `kernels-core demo`: kernels from a Hub, downloaded, checked, run and measured.

Serves the bundled repository on the loopback interface and lets a second process, with the ordinary
client of the Hub and an empty cache, run a block of a model on it: no network, no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from kernels_core import KernelsError, Table, TableRow
from kernels_core.cli import Json, print_found, using_device

if TYPE_CHECKING:
    from kernels_plugins.local_hub.server import LocalHub

BUNDLE = Path(__file__).with_name("hub")
OWNER = "kernels-demo"

_TEXTS = ("module", "layer", "mode", "implementation")
_NUMBERS = ("forward", "gradients", "reference", "kernel", "ratio")


class DType(str, Enum):
    """Type of the model's weights and inputs."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def demo(
    device: Annotated[str, typer.Option(help="Such as cpu or cuda; by default, a GPU if there is one.")] = "",
    dtype: Annotated[DType, typer.Option(help="Type of weights and inputs.")] = DType.float32,
    as_json: Json = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the cache of the Hub's client here.")] = None,
    repository: Annotated[Path, typer.Option(hidden=True, help="Folder of <owner>/<name> to serve.")] = BUNDLE,
) -> None:
    """Run a small Llama block on kernels from a Hub on this machine, and compare it with its reference.

    Exits with 1 where a layer is not served or a number is off.
    """
    from kernels_plugins.local_hub.server import LocalHub

    start = time.perf_counter()
    with using_device(device or ("cuda" if torch.cuda.is_available() else "cpu")) as where:
        pass  # before anything is started
    temporary = partial(tempfile.TemporaryDirectory, prefix="kernels-core-demo-", ignore_cleanup_errors=True)
    with nullcontext(keep) if keep else temporary() as home, LocalHub(repository) as hub:
        folder = Path(home).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        hub.organization(OWNER, trusted=True)
        report = folder / "report.json"
        arguments = ("--device", str(where), "--dtype", dtype.value)
        cold = _run(hub, folder, *arguments, "--report", str(report))
        warm = _run(hub, folder, *arguments)
        result: dict[str, Any] = json.loads(report.read_text())
    result["requests"] = {"cold": cold, "warm": warm}
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["ok"] = all(row["served"] and row["is_right"] for row in result["rows"])
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        rows = [TableRow(_cells(row), "" if row["served"] and row["is_right"] else "red") for row in result["rows"]]
        print_found(Table((*_TEXTS, *_NUMBERS), rows, right=_NUMBERS))
        for refusal in result["refusals"]:
            print_found(Table((), title=f"refused {refusal}", style="red"))
        print(_summary(result))
    raise typer.Exit(0 if result["ok"] else 1)


def _run(hub: LocalHub, home: Path, *arguments: str) -> int:
    """Run a process whose client talks to a Hub, and return how many requests it made."""
    # The report has the refusals that the process would warn of.
    ours = {"KERNELS_CACHE": "", "PYTHONWARNINGS": "ignore::UserWarning"}
    before = hub.count()
    command = [sys.executable, "-m", "kernels_plugins.demo.measure", *arguments]
    # Its standard output must not mix with the JSON of this process.
    done = subprocess.run(command, env={**os.environ, **hub.environment(home), **ours}, stdout=sys.stderr)
    if done.returncode:
        raise KernelsError(f"The demo's process ended with {done.returncode}: its message is above.")
    return hub.count() - before


# --- Printing ------------------------------------------------------------------------------------


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    reference, kernel = row["reference_ms"], row["kernel_ms"]
    times = (f"{reference:.3f} ms", f"{kernel:.3f} ms", f"{reference / kernel:.2f}x") if kernel else ("", "", "")
    texts = (row["module"], row["layer"], f"{row['mode']}, {row['device']}", row["implementation"])
    return (*texts, *(f"{row[name]:.3f}" for name in ("forward_difference", "gradient_difference")), *times)


def _summary(result: dict[str, Any]) -> str:
    requests = result["requests"]
    lines = [
        f"{result['device']}, {result['dtype']}, torch {result['torch']}, "
        + (f"compiled with {result['backend']}." if result["backend"] else "not compiled."),
        "Differences from the reference are in units of the tolerance of torch.testing; for the block, of the",
        "tolerances of its layers together. Up to 1 is right.",
        "Times are medians of forward and backward together.",
        f"HTTP requests: {requests['cold']} with an empty cache, {requests['warm']} with a warm one.",
        f"{'All layers served, all numbers right' if result['ok'] else 'NOT all served and right'}, "
        f"in {result['seconds']} s.",
    ]
    if result["device"] == "cpu":
        lines.insert(4, "The bundled kernels for the CPU are plain torch; those for CUDA are Triton.")
    return "\n".join(lines)
