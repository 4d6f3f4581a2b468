"""`BisectError`: a bisection has no answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from kernels_core import KernelsError


class BisectError(KernelsError):
    """A bisection has no answer; the model is as before.

    Attributes:
        evaluation: At which evaluation of the metric that turned out, counted from 1; 0 for none of them.
        paths: The modules that ran on their kernels in that evaluation.
    """

    def __init__(self, message: str, *, evaluation: int = 0, paths: Sequence[str] = ()) -> None:
        """Keep the evaluation at which the problem was noticed."""
        super().__init__(message)
        self.evaluation = evaluation
        self.paths = tuple(paths)

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive a trip between processes: the constructor takes keywords."""
        return functools.partial(type(self), evaluation=self.evaluation, paths=self.paths), self.args
