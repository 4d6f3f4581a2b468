"""Shows on a terminal how far a bisection is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Show = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress_bar() -> Iterator[Show]:
    """Show a bar on standard error, while that is a terminal.

    Yields:
        A function that shows the evaluation that begins: its number, the expected count, and the kernels that are on.
    """
    if not sys.stderr.isatty():
        yield lambda number, expected, setup: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("bisect"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda number, expected, setup: bar.update(
            task, completed=number - 1, total=max(expected, number), description=setup
        )
