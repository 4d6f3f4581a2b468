"""The command `kernels-core benchmark`: the benchmarks that come with a kernel, in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kernels_core import ArgumentError, KernelsError, Table, TableRow
from kernels_core import as_json as to_json
from kernels_core.cli import Json, print_found

from ...process import command_of
from ..command import Revision, Trust, Version, by_default, keep_client_quiet
from ..request import KernelRequest
from .scripts import FOLDER, Scripts, find_local_scripts, find_scripts

_RUNNER = "kernels_plugins.hub.benchmark.runner"


def benchmark(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="A repository, as owner/name, or a folder.")],
    revision: Revision = None,
    version: Version = None,
    iterations: Annotated[int, typer.Option(min=1, help="Measured calls of each workload.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before those.")] = 10,
    timeout: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="When the process is ended.")] = 600.0,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the scripts of the repository, with your rights.")
    ] = False,
    trust_remote_code: Trust = None,
    as_json: Json = False,
) -> None:
    """Run the benchmarks that come with a kernel, in its folder `benchmarks`, as `kernels benchmark` does.

    They are programs of the publisher: without --trust-code, none is run. The kernel is checked as for every load. By
    default, its newest version. Exits with 1 where a workload fails or its output is not that of its reference.
    """
    keep_client_quiet()
    if Path(kernel).is_dir():
        if revision is not None or version is not None:
            raise ArgumentError(f"{kernel} is a folder: it has neither revisions nor versions; leave both out.")
        scripts, request = find_local_scripts(Path(kernel).resolve()), None
    else:
        revision, version = by_default(kernel, revision, version)
        allowed = trust_remote_code or ()
        scripts = find_scripts(KernelRequest(kernel, revision=revision, version=version, trust_remote_code=allowed))
        request = {"repo_id": kernel, "revision": revision, "version": version, "trust_remote_code": list(allowed)}
        if scripts.commit:  # a push meanwhile changes nothing
            request |= {"repo_id": scripts.repo_id, "revision": scripts.commit, "version": None}
    if not trust_code:
        raise ArgumentError(_refusal(scripts))
    task = {"folder": str(scripts.folder), "digests": dict(scripts.digests), "request": request}
    results: list[dict[str, Any]] = []
    try:
        for result in _run({**task, "iterations": iterations, "warmup": warmup}, timeout):
            results.append(result)
    finally:  # those that were measured before the process was ended, too
        if results or as_json:
            _show(results, scripts, as_json)
    if not results:
        raise ArgumentError(
            f"{scripts.origin}: its scripts have no class of `kernels.benchmark.Benchmark` with benchmark_*."
        )
    raise typer.Exit(0 if all(map(_is_right, results)) else 1)


def _refusal(scripts: Scripts) -> str:
    names = "\n".join(f"  {scripts.folder / FOLDER / name}" for name in scripts.digests)
    return (
        f"The benchmarks of {scripts.origin} are programs of its publisher and run with your rights; no digest in the "
        f"kernel covers them. Nothing was run. Read them:\n{names}\nand add --trust-code to run them in a process of "
        "their own."
    )


def _run(task: dict[str, Any], timeout: float) -> Iterator[dict[str, Any]]:
    """Run the process, and yield each result as it comes."""
    command = command_of(_RUNNER, json.dumps(task))
    ended = threading.Event()
    console = Console(stderr=True)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    ) as child:

        def end() -> None:
            ended.set()
            _kill(child)

        timer = threading.Timer(timeout, end)
        timer.start()
        try:
            with console.status("measuring"):  # draws nothing where standard error is no terminal
                for line in child.stdout or ():
                    if line.endswith("\n"):  # else cut short: the process ended in it
                        yield json.loads(line)
                child.wait()  # it may have closed its output, and go on
        except BaseException:  # such as Ctrl-C
            _kill(child)
            raise
        finally:
            timer.cancel()
    if ended.is_set():
        raise KernelsError(f"The benchmarks were ended after {timeout:g} seconds: give them more with --timeout.")
    if child.returncode:
        raise KernelsError(
            f"The process of the benchmarks ended with exit code {child.returncode}: see its output above."
        )


def _kill(child: subprocess.Popen[str]) -> None:
    """End a process, and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()


# --- Results -------------------------------------------------------------------------------------


def _is_right(result: dict[str, Any]) -> bool:
    return "error" not in result and result["verified"] is not False


def _show(results: list[dict[str, Any]], scripts: Scripts, as_json: bool) -> None:
    if as_json:
        print(to_json(_payload(results, scripts)))
        return
    columns = ("workload", "mean", "reference", "speed-up", "right")
    rows = [
        TableRow(_cells(result), "" if _is_right(result) else "red", [result["error"]] if "error" in result else ())
        for result in results
    ]
    summary = f"{scripts.origin}, times in ms, on {_gpu()}, torch {torch.__version__}, scripts {scripts.digest[:12]}"
    print_found(Table(columns, rows, summary=summary, right=columns[1:-1]))


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    if "error" in result:
        return (result["workload"], "", "", "", "failed")
    times, reference = result["timingResults"], result.get("reference")
    compared = ("", "")
    if reference is not None:
        ratio = reference["mean_ms"] / times["mean_ms"] if times["mean_ms"] else float("inf")
        compared = (f"{reference['mean_ms']:.4f}", f"{ratio:.2f}x")
    right = {True: "yes", False: "NO", None: "not compared"}[result["verified"]]
    spread = f" ±{times['std_ms'] / times['mean_ms']:.0%}" if times["mean_ms"] else ""
    return (result["workload"], f"{times['mean_ms']:.4f}{spread}", *compared, right)


def _payload(results: list[dict[str, Any]], scripts: Scripts) -> dict[str, Any]:
    """Return the results in the form of `kernels benchmark --json`, with ours beside them."""
    machine = {
        "gpu": _gpu(),
        "backend": f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU",
        "pytorchVersion": torch.__version__,
        "os": f"{platform.system()} {platform.release()}",
        "cpu": platform.processor() or platform.machine() or "Unknown",
    }
    return {
        "ok": bool(results) and all(map(_is_right, results)),
        "results": results,
        "machineInfo": machine,
        "kernelCommitSha": scripts.commit,
        "benchmarkScriptPath": FOLDER,
        "benchmarkScriptSha": scripts.digest,
    }


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A"
