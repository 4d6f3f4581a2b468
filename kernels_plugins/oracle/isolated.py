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
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from kernels_core import KernelsError

from ..process import command_of
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
        task = {"arguments": dict(arguments), "out": out}
        child = run_child("kernels_plugins.oracle.command", task, "verify", shown)
        rows = [VerifyRow(**row) for row in child.rows]
        if not child.how:
            return VerifyReport((*rows, *kept))
        if child.begun is None:
            if child.refused:
                return 2
            raise KernelsError(
                f"The process that compares ended {child.how}, while no kernel ran: see its output above, "
                "and run the model on its references."
            )
        begun = VerifyRow(**child.begun)
        out.append(_kernel(begun))
        # The next child leaves this kernel out, with what it has shown.
        kept += [row for row in rows if _kernel(row) == _kernel(begun)]
        kept.append(replace(begun, verdict="failed", reason=f"it ends the process {child.how}"))


@dataclass
class ChildRun:
    """What a child process has written.

    Attributes:
        rows: Its results.
        begun: What it had begun when it ended; None if nothing was left.
        how: How it ended; empty if it was through.
        refused: Whether it has written why it cannot begin.
    """

    rows: list[Any]
    begun: Any
    how: str
    refused: bool


def run_child(
    module: str, task: Mapping[str, Any], name: str, shown: set[str], *, patience: float | None = None
) -> ChildRun:
    """Run a module in a process of its own, with a task as JSON, and show each text that it writes once.

    Args:
        module: It calls `serving` with its first argument.
        task: What it gets.
        name: The command, for lines that are no terminal's.
        shown: Texts that were shown before.
        patience: Seconds after which something that was begun hangs: the process is ended then.
    """
    rows: list[Any] = []
    begun: Any = None
    hung = through = False
    # No fork: a context of CUDA does not live on.
    command = command_of(module, json.dumps(task))
    # Its standard output carries the messages; the output of users' code goes to standard error.
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child,
        _showing(name) as show,
    ):

        def stop() -> None:
            nonlocal hung
            hung = True
            child.kill()

        timer: threading.Timer | None = None
        try:
            for line in child.stdout or ():
                if timer is not None:
                    timer.cancel()
                if not line.endswith("\n"):  # cut short: the process ended in it
                    break
                message = json.loads(line)
                if "row" in message:
                    rows.append(message["row"])
                begun, through = message.get("begin"), message.get("through", False)
                if (text := message.get("text")) and text not in shown:
                    shown.add(text)
                    show(text)
                if begun is not None and patience is not None:
                    timer = threading.Timer(patience, stop)
                    timer.start()
        except BaseException:  # such as Ctrl-C
            child.kill()
            raise
        finally:
            if timer is not None:
                timer.cancel()
    how = f"by force, after {patience:g} seconds in which nothing came of it" if hung else _how(child.returncode)
    # A kernel may end its process as if all were well.
    return ChildRun(rows, begun, "" if through and not hung and not child.returncode else how, child.returncode == 2)


def _kernel(row: VerifyRow) -> _Kernel:
    return row.layer, row.kernel, row.plugin


def _how(code: int) -> str:
    """Describe the end of a process: its exit code, or the signal that ended it."""
    if code >= 0:
        return f"with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"by signal {names.get(-code, -code)}"


@contextmanager
def _showing(name: str) -> Iterator[Callable[[str], None]]:
    """Show the case that runs: in one place on a terminal, else a line for each."""
    console = Console(stderr=True, highlight=False)
    status = console.status("the model is made", spinner="line") if console.is_terminal else None

    def show(text: str) -> None:
        if status is not None:
            status.update(text)
        else:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

    with status or nullcontext():
        yield show


# --- The child -----------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes messages to the parent: `row`, `begin` and `text`; the last one is `through`."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)  # also for native code that prints

        def write(message: dict[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        yield write
        write({"through": True})


def serve(task: dict[str, Any], compare: Callable[..., object]) -> None:
    """Compare in this process, and write messages to its parent."""
    out = {tuple(kernel) for kernel in task["out"]}
    with serving() as write:

        def begin(row: VerifyRow) -> bool:
            if _kernel(row) in out:
                return False
            write({"begin": vars(row), "text": str(row).rpartition(":")[0]})
            return True

        compare(**task["arguments"], begin=begin, found=lambda row: write({"row": vars(row)}))
