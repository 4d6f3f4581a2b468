"""Lines of keys in TOML text: the parser of Python gives values without places."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def find_line(text: str, keys: Sequence[str | int], value: object = None) -> int:
    r"""Return the line of a key, counted from 1; of an item of a list, that on which its text stands.

    Only the parser knows statements from the insides of texts and lists. So it parses beginnings of the file: the first
    one that has the key ends with the statement that sets it. Takes about 15 parses: for messages, not for reading.

    Args:
        text: The whole file, which is valid.
        keys: The way to the key: names of tables and indices of lists.
        value: The value of the key, to find the line of an item in a list of several lines.

    Example:
        >>> find_line('[packs]\n"*" = [\n  "torch",\n  "jax",\n]', ("packs", "*", 1), "jax")
        4
    """
    lines = text.split("\n")
    before, after = 0, len(lines)
    while after - before > 1:
        middle = (before + after) // 2
        if _has(_beginning(lines, middle)[1], keys):
            after = middle
        else:
            before = middle
    first = _beginning(lines, before)[0] + 1
    wanted = value if isinstance(value, str) and value else next((k for k in reversed(keys) if isinstance(k, str)), "")
    return next((line for line in range(first, after + 1) if wanted in lines[line - 1]), first)


def find_fault(text: str) -> int:
    """Return the line, counted from 1, on which the first statement begins that is no TOML."""
    lines = text.split("\n")
    return _beginning(lines, len(lines))[0] + 1


def _beginning(lines: Sequence[str], count: int) -> tuple[int, Any]:
    """Return the data of so many lines, or of fewer where these end inside of a statement; and how many these are."""
    while True:
        try:
            return count, tomllib.loads("\n".join(lines[:count]) + "\n")
        except (ValueError, RecursionError):
            count -= 1


def _has(data: Any, keys: Sequence[str | int]) -> bool:
    for key in keys:
        if isinstance(key, int):
            if not isinstance(data, list) or key >= len(data):
                return False
        elif not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True
