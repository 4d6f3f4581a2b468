"""Fresh processes, forked from one that has imported PyTorch: that takes longer than most programs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(["torch"])


def run_python(*arguments: str, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -c code`, `python -m module` or `python script`, with arguments, in an environment and a folder."""
    with tempfile.TemporaryDirectory() as place:
        streams = [f"{place}/output", f"{place}/errors"]
        process = _CONTEXT.Process(target=_run, args=(arguments, dict(environment), folder, streams))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where the test was over its time
        output, errors = (Path(stream).read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


def _run(arguments: tuple[str, ...], environment: dict[str, str], folder: Path, streams: list[str]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    option, program = arguments[:2] if arguments[0] in ("-c", "-m") else ("", arguments[0])
    sys.argv = [option or program, *arguments[2 if option else 1 :]]
    first = "" if option == "-c" else str(folder) if option else str(Path(program).parent)
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    if option == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
    elif option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
