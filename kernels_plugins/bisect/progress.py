"""Shows on a terminal how far a bisection is."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """A bar on standard error, while that is a terminal; else nothing."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        """Appear."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = TextColumn("bisect"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            text = TextColumn("{task.description}", markup=False)
            self._progress = Progress(*columns, text, console=Console(stderr=True), transient=True)
            self._progress.add_task("")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disappear."""
        if self._progress is not None:
            self._progress.stop()

    def show(self, number: int, of_about: int, setup: str) -> None:
        """Show the evaluation that begins, and how many there may be."""
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=number - 1, total=max(of_about, number), description=setup)
