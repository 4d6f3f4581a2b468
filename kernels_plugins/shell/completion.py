"""Answers to a shell's Tab key, from the outline: an application with the same words, which does nothing."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

_LAYERS = {"layer"}
_REPOSITORIES = {"repo_id", "repo_ids", "kernel", "trust_remote_code", "upgrade"}


def application(outline: dict[str, Any]) -> typer.Typer:
    """Return an application with the commands of an outline, for completion."""
    app = typer.Typer(no_args_is_help=True)
    app.callback()(lambda: None)
    for name, found in outline["commands"].items():
        _add(app, name, found, outline.get("layers", ()))
    return app


def _add(app: typer.Typer, name: str, outline: dict[str, Any], layers: Any) -> None:
    if "commands" in outline:
        group = typer.Typer(help=outline["help"])
        for inner, found in outline["commands"].items():
            _add(group, inner, found, layers)
        app.add_typer(group, name=name)
        return

    def command(**values: object) -> None:
        pass

    # Typer reads a function's signature and annotations.
    parameters = [_parameter(param, layers) for param in outline["params"]]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=outline["help"])(command)


def _parameter(param: dict[str, Any], layers: Any) -> inspect.Parameter:
    kind: Any = bool if param["is_flag"] else list[str] | None if param["many"] else str | None
    words: Callable[[str], list[str]] | None = None
    if param["choices"]:
        words = _beginning(lambda: param["choices"])
    elif param["name"] in _LAYERS:
        words = _beginning(lambda: layers)
    elif param["name"] in _REPOSITORIES:
        words = _beginning(_repositories)
    more: dict[str, Any] = {"help": param["help"]}
    if words is not None:
        more["autocompletion"] = words
    found = typer.Option(*param["options"], **more) if param["is_option"] else typer.Argument(**more)
    default = False if param["is_flag"] else None
    annotation = Annotated[kind, found]
    return inspect.Parameter(param["name"], inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _beginning(words: Callable[[], Any]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def _repositories() -> Iterator[str]:
    """Yield the kernels in the cache, by the names of its folders."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    for folder in sorted(Path(os.path.expanduser(cache)).glob("kernels--*--*")):
        yield folder.name.removeprefix("kernels--").replace("--", "/")
