"""`verify` in a process of its own: a kernel that ends it is a row of the report.

The child writes a line of JSON before each run of a kernel, and one for each row. When it ends in a run, the parent
knows the kernel, and starts another child that leaves this kernel out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from rich.console import Console

from kernels_core import KernelsError

from .report import VerifyReport, VerifyRow

_Kernel = tuple[str, str, str]
"""A kernel to leave out: layer name, label and plugin."""


def in_children(arguments: Mapping[str, Any]) -> VerifyReport | int:
    """Compare in child processes, with arguments of `command.compared` as JSON holds them.

    Returns the report; or the exit code of a child that could not compare, and has written why.
    """
    out: list[_Kernel] = []
    kept: list[VerifyRow] = []
    shown: set[str] = set()
    while True:
        rows: list[VerifyRow] = []
        begun: VerifyRow | None = None
        with _child({"arguments": dict(arguments), "out": out, "path": sys.path}) as child, _showing() as show:
            for line in child.stdout or ():
                if not line.endswith("\n"):  # cut short: the process ended in it
                    break
                message = json.loads(line)
                if "row" in message:
                    rows.append(VerifyRow(**message["row"]))
                begun = VerifyRow(**message["begin"]) if "begin" in message else None
                if begun is not None and (text := str(begun).rpartition(":")[0]) not in shown:
                    shown.add(text)
                    show(text)
        if child.returncode == 0:
            return VerifyReport((*rows, *kept))
        if begun is None:
            if child.returncode == 2:
                return 2
            raise KernelsError(
                f"The process that compares ended {_how(child.returncode)}, while no kernel ran: see its output above, "
                "and run the model on its references."
            )
        out.append(_kernel(begun))
        kept += [row for row in rows if _kernel(row) == _kernel(begun)]
        kept.append(replace(begun, verdict="failed", reason=f"it ends the process {_how(child.returncode)}"))


def _kernel(row: VerifyRow) -> _Kernel:
    return row.layer, row.kernel, row.plugin


def _how(code: int) -> str:
    """Describe the end of a process: its exit code, or the signal that ended it."""
    if code >= 0:
        return f"with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"by signal {names.get(-code, -code)}"


@contextmanager
def _child(task: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "kernels_plugins.oracle.command", json.dumps(task)]  # which calls `serve`
    # Its standard output carries the messages; the output of users' code goes to standard error.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        try:
            yield child
        except BaseException:  # such as Ctrl-C
            child.kill()
            raise


@contextmanager
def _showing() -> Iterator[Callable[[str], None]]:
    """Show the case that runs: in one place on a terminal, else a line for each."""
    console = Console(stderr=True, highlight=False)
    status = console.status("", spinner="line") if console.is_terminal else None

    def show(text: str) -> None:
        if status is not None:
            status.update(text)
        else:
            print(f"verify: {text}", file=sys.stderr, flush=True)

    with status or nullcontext():
        yield show


# --- The child -----------------------------------------------------------------------------------


def serve(task: dict[str, Any], compare: Callable[..., object]) -> None:
    """Compare in this process, and write messages to its parent."""
    sys.path[:] = task["path"]
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # also for native code that prints
    out = {tuple(kernel) for kernel in task["out"]}

    def write(kind: str, row: VerifyRow) -> None:
        stream.write(json.dumps({kind: vars(row)}) + "\n")
        stream.flush()

    def begin(row: VerifyRow) -> bool:
        if _kernel(row) in out:
            return False
        write("begin", row)
        return True

    compare(**task["arguments"], begin=begin, found=lambda row: write("row", row))
