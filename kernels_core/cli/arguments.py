"""The arguments of commands: objects that they name, files that they write, devices that they use."""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import ArgumentError
from ..layer import find_layer


class CallMode(str, Enum):
    """How a call is made: the values of `--mode`."""

    inference = "inference"
    training = "training"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def imported(place: str) -> Any:
    """Import the object that an argument names, also from the current directory; also for the commands of plugins.

    The output of the import goes to standard error. An import that fails raises `ArgumentError`.

    Example:
        >>> imported("torch.nn:Linear").__name__
        'Linear'
    """
    module_name, _, qualname = place.partition(":")
    if os.getcwd() not in sys.path:  # it stays there, as with `python -m`: a function may import more when called
        sys.path.insert(0, os.getcwd())
    if not qualname:
        raise ArgumentError(f"Cannot import {place!r}: add the name of an object in it, as package.module:name.")
    try:
        with printing_aside():
            return operator.attrgetter(qualname)(importlib.import_module(module_name))
    except (Exception, SystemExit) as error:
        raise ArgumentError(f"Cannot import {place!r}: {type(error).__name__}: {error}") from error


def made(place: str, what: str = "model") -> Any:
    """Import the object that an argument names, and call it if it is a factory; also for the commands of plugins.

    Modules, decorated functions, and objects that cannot be called are returned as they are. A factory that raises
    is an `ArgumentError`; `what` is the object that it makes, for the message.

    Example:
        >>> made("torch.nn:Identity")
        Identity()
    """
    found = imported(place)
    layer = find_layer(found)
    if isinstance(found, torch.nn.Module) or (layer is not None and layer.is_function) or not callable(found):
        return found
    try:
        with printing_aside():
            return found()
    except (Exception, SystemExit) as error:
        raise ArgumentError(f"{place!r} makes no {what}: {type(error).__name__}: {error}") from error


def printing_aside() -> contextlib.AbstractContextManager[object]:
    """Send the output of users' code to standard error: standard output is for the answer of a command."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that names the path; for the commands of plugins, too."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"Cannot write {str(path)!r}: {error}") from error


@contextlib.contextmanager
def using_device(name: str) -> Iterator[torch.device]:
    """Yield a device, and turn errors of its use into one that names it; for the commands of plugins, too."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        yield device
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA
        raise ArgumentError(f"The device {name!r} cannot be used here: {error}") from error
