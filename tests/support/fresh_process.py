"""Fresh processes, forked from one that has imported PyTorch: that takes longer than most programs."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import torch

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
_starting = threading.Lock()


@functools.cache
def _server(compiler: bool) -> forkserver.ForkServer:
    """Return a process to fork from; without the compiler, tests notice an import of it."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["torch", *(["torch._dynamo", "torch._inductor.compile_fx"] if compiler else [])])
    return server


def run_python(
    *arguments: str, environment: Mapping[str, str], folder: Path, compiler: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -c code`, `python -m module` or `python script`, with arguments, in an environment and a folder.

    With `compiler`, Dynamo and Inductor are imported, too: their variables are those of this process, but for the
    folder of the cache. Not on a machine with a GPU: they initialise CUDA, and no fork could use it.
    """
    compiler = compiler and not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as place:
        streams = [f"{place}/output", f"{place}/errors"]
        process = _CONTEXT.Process(target=_run, args=(arguments, dict(environment), folder, streams))
        with _starting, _forking_from(compiler):
            process.start()
        try:
            process.join()
        finally:
            process.kill()  # where the test was over its time
        output, errors = (Path(stream).read_text(encoding="utf-8") for stream in streams)
    return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


@contextmanager
def _forking_from(compiler: bool) -> Iterator[None]:
    """Let processes start as forks of one of our servers, rather than of that of `multiprocessing`."""
    if _METHOD != "forkserver":
        yield
        return
    usual = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _server(compiler).connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = usual


def _run(arguments: tuple[str, ...], environment: dict[str, str], folder: Path, streams: list[str]) -> None:
    gc.freeze()  # the objects of PyTorch are in no collection of garbage, which would copy their memory
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
