"""The outline of the command line: commands, options and names, kept in a file.

A shell asks at each press of Tab. Importing PyTorch takes a second or more, and reading this file a few milliseconds.
Nothing here imports `kernels_core` before it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

_FORMAT = 1
_FAULTS = (OSError, ValueError, RuntimeError)  # the last one where a user has no home


def find_outline() -> dict[str, Any] | None:
    """Return the outline that was kept; None if there is none, or it is of other packages than the installed ones."""
    with contextlib.suppress(*_FAULTS):
        outline = json.loads(_place().read_text(encoding="utf-8"))
        if isinstance(outline, dict) and outline.get("key") == _key():
            return outline
    return None


def keep_outline(outline: Mapping[str, Any]) -> None:
    """Write an outline for later processes, where that is possible."""
    from ..files import write_file  # whoever makes an outline has imported the core

    with contextlib.suppress(*_FAULTS):
        write_file(_place(), json.dumps({**outline, "key": _key()}))


def describe(app: Any) -> dict[str, Any]:
    """Return the outline of an application of Typer, from the signatures of its functions."""
    commands: dict[str, Any] = {}
    for command in app.registered_commands:
        function = command.callback
        params = inspect.signature(function, eval_str=True).parameters.values()
        commands[command.name or function.__name__.replace("_", "-")] = {
            "help": (inspect.getdoc(function) or "").partition("\n")[0],
            "params": [_describe(param) for param in params if not _of_typer(param, "hidden")],
        }
    for group in app.registered_groups:
        commands[group.name] = {"help": group.typer_instance.info.help or "", **describe(group.typer_instance)}
    return {"commands": commands}


def _describe(param: inspect.Parameter) -> dict[str, Any]:
    kind = get_args(param.annotation)[0] if get_origin(param.annotation) is Annotated else param.annotation
    kinds = [kind, *get_args(kind)]  # `str | None` is a `str`
    enum = next((one for one in kinds if isinstance(one, type) and issubclass(one, Enum)), ())
    info = _of_typer(param)
    return {
        "name": param.name,
        "is_option": "Option" in type(info).__name__ if info is not None else param.default is not param.empty,
        # In an annotation, Typer takes the first name for a default.
        "options": [
            word
            for word in (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ()))
            if isinstance(word, str) and word.startswith("-")
        ],
        "is_flag": bool in kinds,
        "many": any(get_origin(one) is list for one in kinds),
        "choices": [str(choice.value) for choice in enum],
        "help": getattr(info, "help", None) or "",
    }


def _of_typer(param: inspect.Parameter, name: str = "") -> Any:
    """Return the description of a parameter that its annotation has, or an attribute of that."""
    info = next((one for one in get_args(param.annotation)[1:] if hasattr(one, "param_decls")), None)
    return getattr(info, name, None) if name else info


def _place() -> Path:
    chosen = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME")
    # Environments differ in their plugins, and take turns.
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    return Path(os.path.expanduser(chosen or Path.home() / ".cache")) / "kernels-core" / "commands" / f"{name}.json"


def _key() -> str:
    """Return a digest of all that decides which commands there are."""
    found = importlib.metadata.entry_points(group="kernels_core")
    plugins = sorted((e.name, e.value, e.dist.version if e.dist else "") for e in found)
    # An installation in place changes without a new version.
    folders = [Path(__file__).parents[2] / package for package in ("kernels_core", "kernels_plugins")]
    places = ("cli/*.py", "*/command.py", "*/*/command.py")
    times = [path.stat().st_mtime_ns for folder in folders for place in places for path in folder.glob(place)]
    chosen = os.environ.get("KERNELS_PLUGINS", "")
    return hashlib.sha256(json.dumps([_FORMAT, plugins, sorted(times), chosen]).encode()).hexdigest()
