"""`Side`: one of the two models that are compared, in its setting, and its runs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from kernels_core import ArgumentError, ArgumentTypeError, DecisionFile, error_text, forget
from kernels_core.replay import ModelState, each_tensor, leaves, mapped
from kernels_core.torch_internals import many_compilations

from .digests import Digests, Key
from .report import ConsistencyError

Setting = Callable[[], AbstractContextManager[object]] | str | os.PathLike[str]
"""A function that makes the context manager around each run, or the path of a decision file."""

_DECISIONS = "KERNELS_DECISIONS"


class Side:
    """A model, a setting that is entered around each of its runs, and how many rows it gets at once."""

    def __init__(self, name: str, model: nn.Module, setting: Setting | None, batch: int | None) -> None:
        self.name, self.model, self.batch = name, model, batch
        self.runs = 0
        self.decided: frozenset[str] | None = None  # the names of the layers in a decision file
        self._setting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        if isinstance(setting, str | os.PathLike):
            self._setting = functools.partial(_replaying, os.fspath(setting))
            decided = [layer for model in DecisionFile.from_file(setting).models for layer in model.decided]
            self.decided = frozenset(layer.layer for layer in decided)
        elif setting is not None:
            self._setting = setting
        self._state = ModelState(model)

    @property
    def is_compiled(self) -> bool:
        """Whether the model, or a module of it, is compiled."""
        return any(
            type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None
            for module in self.model.modules()
        )

    def run(
        self,
        inputs: Any,
        seed: int,
        *,
        by_row: bool = False,
        gradients: bool = False,
        hold: Key | None = None,
        only: Iterable[nn.Module] | None = None,
        parameters: bool = False,
    ) -> Digests:
        """Run the model on copies of the inputs, and return the record; the model is restored afterwards."""
        record = Digests(
            self.model, seed, by_row=by_row, hold=hold, only=only, compiled=self.is_compiled, parameters=parameters
        )
        copies = _copies(inputs)
        self.runs += 1
        if self.is_compiled:
            torch.compiler.reset()  # Dynamo has no guard on hooks: code compiled before would run past them
        try:
            with self._state.kept(), many_compilations(), self._setting(), record.installed(gradients):
                for args, kwargs, rows in _parts(copies, self.batch):
                    record.begin(rows)
                    with torch.set_grad_enabled(gradients):
                        output = self.model(*args, **kwargs)
                    if gradients:
                        record.begin_backward()
                        _backward(output, seed)
                    del output
                record.finish()
        except Exception as error:
            where = record.where
            at = f" in layer {where or '(the model)'!r}" if where is not None else ""
            raise ConsistencyError(
                f"{self.name} raised{at}: {error_text(error).rstrip('.')}. Nothing was compared; the models are as "
                "before.",
                side=self.name,
                path=where,
            ) from error
        finally:
            if self.is_compiled:
                torch.compiler.reset()  # or code with these hooks would run on
        if changed := self._state.changed_parameters():
            raise ConsistencyError(
                f"{self.name} changes its parameters when it is called, such as {changed[0]!r}: a second run would "
                "begin with others, and this one stays. Compare models that leave their parameters as they are.",
                side=self.name,
            )
        return record


@contextlib.contextmanager
def _replaying(path: str) -> Iterator[None]:
    """Replay the decisions in a file, and nothing else's, in this process."""
    before = os.environ.get(_DECISIONS)
    os.environ[_DECISIONS] = path
    forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DECISIONS]
        else:
            os.environ[_DECISIONS] = before
        forget()


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as the arguments of a call: a function is called, a tuple, list or dict is opened."""
    try:
        made = inputs() if callable(inputs) and not isinstance(inputs, torch.Tensor | Mapping) else inputs
    except Exception as error:
        raise ArgumentError(f"inputs() raised {error_text(error)}") from error
    if isinstance(made, Mapping) and not all(isinstance(name, str) for name in made):
        raise ArgumentTypeError(f"inputs is a dict of arguments by name, not {list(made)!r}.")
    both: tuple[tuple[Any, ...], dict[str, Any]] = (
        ((), dict(made))
        if isinstance(made, Mapping)
        else (tuple(made) if isinstance(made, tuple | list) else (made,), {})
    )
    for value in (*both[0], *both[1].values()):
        if isinstance(value, Iterator) or (made is value and hasattr(value, "__iter__") and not torch.is_tensor(value)):
            raise ArgumentTypeError(
                f"inputs is or has a {type(value).__name__}, which may give other data each time: pass a tensor, tuple "
                "of arguments, a dict of named ones (such as next(iter(loader))), or a function that returns the same."
            )
    return both


def _copies(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one run: copies, for a model may write to them; those that a function makes are new."""
    args, kwargs = arguments(inputs)
    for where, leaf in leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise ArgumentError(f"inputs{where} is on the meta device, which has no bits: pass it on another.")
    if callable(inputs) and not isinstance(inputs, torch.Tensor | Mapping):
        return args, kwargs

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    both: tuple[tuple[Any, ...], dict[str, Any]] = mapped((args, kwargs), each_tensor(copied))
    return both


def _parts(
    both: tuple[tuple[Any, ...], dict[str, Any]], batch: int | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], int]]:
    """Yield the arguments for each part of a batch, with its rows; the first tensor has the number of all rows."""
    sizes = [leaf.shape[0] for _, leaf in leaves(both) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    rows = sizes[0] if sizes else 0
    if batch is None or not rows:
        yield *both, rows or 1
        return
    for start in range(0, rows, batch):

        def part(leaf: torch.Tensor, start: int = start) -> torch.Tensor:
            return leaf[start : start + batch] if leaf.dim() and leaf.shape[0] == rows else leaf

        args, kwargs = mapped(both, each_tensor(part))
        yield args, kwargs, min(batch, rows - start)


def _backward(output: Any, seed: int) -> None:
    """Run backward from all outputs, with the same gradients for the same shapes."""
    outputs = [leaf for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not outputs:
        raise ArgumentError("no output requires grad, so there are no gradients to compare: leave out gradients=True.")
    generator = torch.Generator("cpu").manual_seed(seed)
    # On the CPU and in float32, whatever the defaults of the process are.
    drawn = [torch.randn(tuple(e.shape), generator=generator, dtype=torch.float32, device="cpu") for e in outputs]
    gradients = [numbers.to(each.device, each.dtype) for numbers, each in zip(drawn, outputs, strict=True)]
    torch.autograd.backward(outputs, gradients)
