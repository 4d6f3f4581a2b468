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
from ..mode import Mode
from ..raised import error_text
from ..replay import each_tensor, mapped


class CallMode(str, Enum):
    """How a call is made: the values of `--mode`."""

    inference = "inference"
    training = "training"


Factory = Annotated[str, typer.Argument(help="A module, or a function that makes one, as package.module:name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def mode_of(mode: CallMode | None, traced: bool, model: Any = None) -> Mode:
    """Return the mode that options name; by default, that of a model as it is."""
    if mode is None:
        mode = CallMode.training if getattr(model, "training", False) else CallMode.inference
    return Mode[mode.value.upper()] | (Mode.TORCH_COMPILE if traced else Mode(0))


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
        raise ArgumentError(f"Cannot import {place!r}: {error_text(error)}") from error


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
        raise ArgumentError(f"{place!r} makes no {what}: {error_text(error)}") from error


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


def with_inputs(
    model: Any,
    inputs: str,
    device: str | None,
    what: str = "them",
    why: str = "The inputs of the model are not known, for it",
) -> tuple[Any, Any]:
    """Return a model and its inputs, on a device: those of a function that is named, or its `dummy_inputs`.

    Where it has none, `ArgumentError` says why a function is needed, and what it returns.
    """
    given = made(inputs, "inputs") if inputs else getattr(model, "dummy_inputs", None)
    if given is None:
        raise ArgumentError(
            f"{why} has no dummy_inputs: name a function that returns {what}, with --inputs package.module:function."
        )
    if device:
        with using_device(device) as where:
            given = mapped(given, each_tensor(lambda tensor: tensor.to(where)))
            model = model.to(where) if isinstance(model, torch.nn.Module) else model
    return model, given
