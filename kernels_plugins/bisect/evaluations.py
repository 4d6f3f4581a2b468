"""Evaluates a metric with some kernels on, counts and shows that, and reports errors."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from kernels_core import ArgumentTypeError, error_text, quarantined
from kernels_core.replay import ModelState
from kernels_core.torch_internals import many_compilations

from .measure import Reading
from .result import BisectError
from .switch import Kernel, Key, Switch

Metric = Callable[[nn.Module], object]
Show = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Show]:
    """Yield a function that shows an evaluation on standard error, while that is a terminal: number, of, setup."""
    if not sys.stderr.isatty():
        yield lambda number, expected, setup: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("bisect"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda number, expected, setup: progress.update(
            task, completed=number - 1, total=max(expected, number), description=setup
        )


class Evaluations:
    """The evaluations of one bisection."""

    def __init__(self, model: nn.Module, metric: Metric, switch: Switch, show: Show) -> None:
        self.count = 0
        self.kernels: Sequence[Kernel] = ()  # in use, known after the suspect was evaluated
        self._model = model
        self._metric = metric
        self._switch = switch
        self._show = show
        self._state = ModelState(model)
        self._names: set[str] | None = None
        self._known: dict[frozenset[Key], Reading] = {}

    def suspect(self) -> Reading:
        """Evaluate the model as it is, and note its kernels."""
        with self._switch.noting():
            reading = self._evaluate("the model as it is", ())
        # Those of one origin side by side: they mostly are culprits together.
        self.kernels = sorted(self._switch.kernels.values(), key=lambda kernel: (kernel.origin, kernel.place))
        return reading

    def anew(self, on: Sequence[Kernel]) -> Reading:
        """Evaluate with some kernels on, and every other decorated layer on its reference."""
        keys = frozenset(kernel.key for kernel in on)
        with self._switch.only(keys):
            reading = self._known[keys] = self._evaluate(_described(on), [kernel.path for kernel in on])
        return reading

    def with_only(self, on: Sequence[Kernel]) -> Reading:
        """Return the reading of `anew`, from memory if there is one."""
        known = self._known.get(frozenset(kernel.key for kernel in on))
        return known if known is not None else self.anew(on)

    def _evaluate(self, setup: str, paths: Sequence[str]) -> Reading:
        self.count += 1
        self._show(self.count, self._expected(), setup)
        where = f"evaluation {self.count}, with {setup}"
        failed = functools.partial(BisectError, evaluation=self.count, paths=paths)
        before = quarantined()  # a kernel that is out in the middle makes later readings those of its reference
        with self._state.kept(), many_compilations():  # each set of kernels compiles the model again
            try:
                answer = self._metric(self._model)
            except Exception as error:
                raise failed(
                    f"The metric raised at {where}: {error_text(error).rstrip('.')}. Nothing was found; the model "
                    "is as before."
                ) from error
        if changed := self._state.changed_parameters():
            raise failed(
                f"At {where}, the metric changed {len(changed)} parameters of the model, such as {changed[0]!r}, and "
                "those are not kept twice: they stay changed. Let the metric leave the model as it is; to compare "
                "training, return losses or the norms of gradients."
            )
        if out := [entry for entry in quarantined() if entry not in before]:
            raise failed(
                f"At {where}, a kernel was taken out, and serves no more:\n"
                + "".join(f"  {entry}\n" for entry in out)
                + "That is a culprit. Repair it or take it out of the mapping, or let it back in with "
                "kernels_core.release(), and bisect again."
            )
        try:
            reading = Reading.of(answer)
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"At {where}, the metric returned {error}.") from error
        names = set(reading.numbers)
        if self._names is None:
            self._names = names
        if names != self._names:
            raise failed(
                f"At {where}, the metric returned {sorted(names)}, and before that {sorted(self._names)}: return the "
                "same numbers each time."
            )
        return reading

    def _expected(self) -> int:
        """Return the expected number of evaluations, as if there were one more culprit."""
        per_culprit = math.ceil(math.log2(max(2, len(self.kernels)))) + 2
        # 4: the model as it is, the baseline twice, all kernels again.
        return 4 + per_culprit * max(1, math.ceil((self.count - 4) / per_culprit))


def _described(on: Sequence[Kernel]) -> str:
    if not on:
        return "every decorated layer on its reference"
    shown = ", ".join(repr(kernel.path) for kernel in on[:3])
    more = f" and {len(on) - 3} more" if len(on) > 3 else ""
    return f"only the kernels of {shown}{more} on"
