"""Measure kernels-core: `python benchmarks/run.py [--only NAME] [--json FILE] [--markdown]`.

Exits with 1 if a limit is broken. Limits are for the machine at hand: ratios are taken between subjects that were
timed in turns. With Hugging Face `kernels` installed, scopes and `kernelize` are compared with it; with transformers,
calls are also timed inside of its Llama.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import adopt
import canary
import canary_outliers
import cold
import compiled
import eager
import in_model
import in_place
import kernelize
import scope
import startup
import torch
import triton_pack
from measure import Row
from rich.console import Console
from rich.table import Table

import kernels_core
import kernels_plugins.mapping

BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    "eager": eager.run,
    "in_place": in_place.run,
    "in_model": in_model.run,
    "compiled": compiled.run,
    "kernelize": kernelize.run,
    "scope": scope.run,
    "startup": startup.run,
    "cold": cold.run,
    "canary": canary.run,
    "outliers": canary_outliers.run,
    "adopt": adopt.run,
    "triton": triton_pack.run,
}
COLUMNS = ("bench", "subject", "measured", "peer", "peer measured", "ratio", "limit", "goal", "")


def main() -> int:
    """Run what was asked for, print it, and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure kernels-core.")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", category=kernels_core.KernelsWarning)
    with warnings.catch_warnings():
        manager = kernels_core.plugin_manager()
        if "mapping" not in manager.plugins():  # a checkout that is not installed has no entry points
            manager.register(kernels_plugins.mapping, "mapping")
        rows = []
        for name in options.only or BENCHMARKS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += BENCHMARKS[name]()

    facts = environment()
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": [row.as_dict() for row in rows]}, indent=2) + "\n")
    if options.markdown:
        print(markdown(rows, facts))
    else:
        show(rows, facts)
    broken = [row for row in rows if row.passed is False]
    for row in broken:
        print(f"limit broken: {row.bench}, {row.subject}", file=sys.stderr)
    return 1 if broken else 0


def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "kernels_core": kernels_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown processor"


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, one item per column."""
    ratio = f"{row.ratio:.3f}" if row.ratio is not None else ""
    unit = "x" if row.judge == "ratio" else f" {row.unit}"
    return (
        row.bench,
        row.subject,
        _number(row.value, row.unit),
        row.peer,
        _number(row.peer_value, row.unit) if row.peer_value is not None else "",
        ratio,
        f"{row.limit:g}{unit}" if row.limit is not None else "",
        f"{row.goal:g}{unit}" if row.goal is not None else "",
        {True: "pass", False: "FAIL", None: ""}[row.passed],
    )


def _number(value: float, unit: str) -> str:
    digits = 4 if unit == "x" else 3
    return f"{value:.0f} {unit}" if value == int(value) or value >= 100 else f"{value:.{digits}g} {unit}"


def show(rows: list[Row], facts: dict[str, str]) -> None:
    """Print a table for the terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=180)
    table = Table(title="  ".join(f"{key} {value}" for key, value in facts.items()), title_justify="left")
    for column in COLUMNS:
        right = column in ("measured", "peer measured", "ratio", "limit", "goal")
        table.add_column(column, justify="right" if right else "left")
    previous = rows[0].bench if rows else ""
    for row in rows:
        if row.bench != previous:
            table.add_section()
            previous = row.bench
        style = {True: None, False: "bold red", None: "dim"}[row.passed]
        table.add_row(*cells(row), style=style)
    console.print(table)


def markdown(rows: list[Row], facts: dict[str, str]) -> str:
    """Return a Markdown table, and under it what the numbers depend on."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in facts.items())])


if __name__ == "__main__":
    sys.exit(main())
