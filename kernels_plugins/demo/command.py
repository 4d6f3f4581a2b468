"""The command `kernels-core demo`: kernels from a Hub, downloaded and checked, and a model with the best of many.

Serves the bundled repository on the loopback interface and lets a second process, with the ordinary
client of the Hub and an empty cache, run models on it: no network, no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from kernels_core import ArgumentError, KernelsError, Table, TableRow
from kernels_core.cli import Json, print_found, using_device

from ..choice.choice import Choice
from ..choice.page import short_name
from ..process import command_of
from .bundle import write_bundle

if TYPE_CHECKING:
    from kernels_plugins.local_hub.server import LocalHub

OWNER = "kernels-demo"


class DType(str, Enum):
    """Type of the model's weights and inputs."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def demo(
    device: Annotated[str, typer.Option(help="Such as cpu or cuda; by default, a GPU if there is one.")] = "",
    dtype: Annotated[DType | None, typer.Option(help="By default float32 on a CPU, bfloat16 on a GPU.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page about the model, too.")] = None,
    as_json: Json = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the cache of the Hub's client here.")] = None,
    repository: Annotated[Path | None, typer.Option(hidden=True, help="Folder of <owner>/<name> to serve.")] = None,
    seconds: Annotated[float, typer.Option(help="How long each step of the model is timed.")] = 3.0,
) -> None:
    """Run kernels from a Hub on this machine, and make a small model faster: measured on the spot, per layer and shape.

    Exits with 1 where a kernel of the Hub does not serve, or a number is off. Where nothing is won, it says so.
    """
    from kernels_plugins.local_hub.server import LocalHub

    start = time.perf_counter()
    if not 0 < seconds < 1e6:
        raise ArgumentError(f"--seconds is {seconds:g}: give the seconds to time each step for, such as 3.")
    with using_device(device or ("cuda" if torch.cuda.is_available() else "cpu")) as where:
        pass  # before anything is started
    temporary = partial(tempfile.TemporaryDirectory, prefix="kernels-core-demo-", ignore_cleanup_errors=True)
    with (
        temporary() as served,
        nullcontext(keep) if keep else temporary() as home,
        LocalHub(repository or write_bundle(Path(served, "hub"))) as hub,
    ):
        folder = Path(home).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        hub.organization(OWNER, trusted=True)
        report = folder / "report.json"
        chosen = dtype or (DType.float32 if where.type == "cpu" else DType.bfloat16)
        arguments = ("--device", str(where), "--dtype", chosen.value)
        page = ("--html", str(html.absolute())) if html is not None else ()
        cold = _run(hub, folder, *arguments, *page, "--seconds", str(seconds), "--report", str(report))
        warm = _run(hub, folder, *arguments)
        result: dict[str, Any] = json.loads(report.read_text())
    result["requests"] = {"cold": cold, "warm": warm}
    result["seconds"] = round(time.perf_counter() - start, 1)
    steps = result.get("steps", [])
    result["ok"] = all(row["served"] and row["is_right"] for row in result["rows"])
    result["ok"] &= bool(steps) and all(step["difference"] <= 1 for step in steps)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for table in _tables(result):
            print_found(table)
            print()
        print(_summary(result))
    raise typer.Exit(0 if result["ok"] else 1)


def _run(hub: LocalHub, home: Path, *arguments: str) -> int:
    """Run a process whose client talks to a Hub, and return how many requests it made."""
    # The report has the refusals that the process would warn of.
    ours = {"KERNELS_CACHE": "", "PYTHONWARNINGS": "ignore::UserWarning"}
    before = hub.count()
    command = command_of("kernels_plugins.demo.measure", *arguments)
    # Its standard output must not mix with the JSON of this process.
    done = subprocess.run(command, env={**os.environ, **hub.environment(home), **ours}, stdout=sys.stderr)
    if done.returncode:
        raise KernelsError(f"The demo's process ended with {done.returncode}: its message is above.")
    return hub.count() - before


# --- Printing ------------------------------------------------------------------------------------


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    numbers = ("forward", "gradients")
    rows = [
        TableRow(
            (
                row["module"],
                row["layer"],
                *(f"{row[name]:.3f}" for name in ("forward_difference", "gradient_difference")),
            ),
            "" if row["served"] and row["is_right"] else "red",
        )
        for row in result["rows"]
    ]
    origins = ", ".join(sorted({row["implementation"] for row in result["rows"]}))
    yield Table(("module", "layer", *numbers), rows, title=f"From the Hub: {origins}", right=numbers)
    for refusal in result["refusals"]:
        yield Table((), title=f"refused {refusal}", style="red")
    if "steps" not in result:
        return
    times = ("as it was", "with kernels", "faster", "difference")
    rows = [
        TableRow(
            (
                step["name"],
                f"{step['plain_ms']:.2f} ms",
                f"{step['chosen_ms']:.2f} ms",
                f"{1 / step['ratio']:.2f}x",
                f"{step['difference']:.3f}",
            ),
            "green" if step["ratio"] < 0.97 else "",
        )
        for step in result["steps"]
    ]
    yield Table(("step", *times), rows, title=result["model"], right=times)
    choice = Choice.read(result["choice"])
    columns = ("reference", "best", "faster")
    rows = [
        TableRow(
            (
                cell.layer,
                f"rows {cell.rows}, {cell.mode}",
                short_name(cell.winner),
                f"{cell.times['reference'] * 1e6:.0f} us",
                f"{cell.times[cell.winner] * 1e6:.0f} us",
                f"{1 / cell.ratio(cell.winner):.2f}x",
            ),
            "green" if cell.winner != "reference" else "",
        )
        for one in choice.machines
        for cell in one.cells
    ]
    yield Table(("layer", "calls", "serves", *columns), rows, title="Each layer, measured", right=columns)
    counts = Counter(short_name(row["origin"]) for row in result["receipt"])
    served = [TableRow((origin, count), "" if origin == "reference" else "green") for origin, count in counts.items()]
    yield Table(("serves inference", "layers"), served, title="Receipt", right=("layers",))


def _summary(result: dict[str, Any]) -> str:
    requests = result["requests"]
    best = [f"{step['name']} {1 / step['ratio']:.2f}x" for step in result.get("steps", []) if step["ratio"] < 0.97]
    won = f"Faster: {', '.join(best)}." if best else "Nothing was won on this machine: the references serve on."
    lines = [
        won
        if "steps" in result
        else "The model was not measured, for the kernels of the Hub do not all serve rightly.",
        f"{result['device']}, one thread, {result['dtype']}, torch {result['torch']}"
        + ("." if result["compiler"] else "; no C++ compiler, so nothing was compiled: set CXX, or install g++."),
        "Differences are in units of the tolerance of torch.testing, for each layer. Up to 1 is right.",
        "Times are taken in turns; those of training have the backward.",
        f"HTTP requests: {requests['cold']} with an empty cache, {requests['warm']} with a warm one.",
        f"{'All served, all numbers right' if result['ok'] else 'NOT all served and right'}, "
        f"in {result['seconds']} s. Next: docs/quickstart.md, with a model of yours.",
    ]
    return "\n".join(lines)
