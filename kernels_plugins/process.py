"""Modules that run in a process of their own."""

from __future__ import annotations

import sys


def command_of(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours in another process, with the path of this one.

    With `python -m`, the new process would look into the working directory before all else: a file `json.py` there
    would run, though this process never looks there.
    """
    start = (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; runpy.run_module({module!r}, None, '__main__', True)"
    )
    return [sys.executable, "-c", start, *arguments]
