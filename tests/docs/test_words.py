"""Docstrings name things: first lines without "what" as a noun, and without tellers that have no name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
VAGUE = re.compile(r"\b(what|told|said|seen|nobody|somebody|anybody)\b", re.IGNORECASE)
LIMIT = 0.2
"""Share of first lines that may have such a word."""


def first_lines() -> Iterator[tuple[str, str]]:
    """Yield the place and the first line of each docstring of both packages, except those of the demo's kernels."""
    for package in ("kernels_core", "kernels_plugins"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "demo/hub" in path.as_posix():
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    line = (ast.get_docstring(node) or "").partition("\n")[0]
                    if line:
                        yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", line


def test_first_lines_name_things() -> None:
    """At most a small share of first lines has a word that names nothing and nobody; CONTRIBUTING lists better ones."""
    lines = list(first_lines())
    vague = [f"{place}: {line}" for place, line in lines if VAGUE.search(line)]
    assert len(lines) > 1000
    assert len(vague) <= LIMIT * len(lines), "\n".join([f"{len(vague)} of {len(lines)}", *vague])
