"""Fresh processes for scripts, forked from one that has imported PyTorch: that takes longer than most scripts."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
if _METHOD == "forkserver":
    _CONTEXT.set_forkserver_preload(["torch"])


def run_script(script: Path, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as `python script` does, without warnings, in an environment and a folder."""
    streams = folder / "output.txt", folder / "errors.txt"
    process = _CONTEXT.Process(target=_run, args=(script, environment, folder, streams))
    process.start()
    try:
        process.join()
    finally:
        process.kill()  # where the test was over its time
    output, errors = (stream.read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(str(script), process.exitcode, output, errors)


def _run(script: Path, environment: dict[str, str], folder: Path, streams: tuple[Path, Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(script.parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [str(script)]
    warnings.simplefilter("ignore")
    runpy.run_path(str(script), run_name="__main__")
