"""The printing of answers: tables on a terminal, aligned columns in a pipe, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from ..table import Table, visible
from ..table import as_json as to_json

Row = dict[str, Any]


def print_rows(rows: Sequence[Row], as_json: bool = False, *, style: Callable[[Row], str] | None = None) -> None:
    """Print rows that have the same columns, as `Table.of` shows them, or as JSON; also for the commands of plugins.

    Example:
        >>> print_rows([{"name": "silu", "variants": ["torch-cpu", "torch-cuda"]}])
        name  variants
        silu  torch-cpu torch-cuda
    """
    if as_json:
        print(to_json(rows))
    elif rows:
        print_found(Table.of(rows, style))


def print_found(found: Any, as_json: bool = False) -> None:
    """Print a `Table`, a result that is shown as one, or its `to_json()`; also for the commands of plugins.

    Example:
        >>> print_found(receipt(torch.nn.Linear(2, 2)))
        no decorated layer; adopt(model) makes layers of an undecorated model dispatch
    """
    console = Console(highlight=False)
    if as_json or not console.is_terminal:  # for grep and cut: no wrapping
        print(found.to_json() if as_json else found)
    else:
        console.print(found)


def print_error(error: object) -> None:
    """Print an error on standard error, as a line that begins with `error:`; also for the commands of plugins."""
    print(f"error: {visible(str(error))}", file=sys.stderr)
