"""The words of CONTRIBUTING.md, where a test can count them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import FILES, ROOT

WORDS = re.compile(r"\b(what|told|said|seen|nobody|somebody|anybody)\b", re.IGNORECASE)
LIMIT = 0.02
"""Share of first lines that may have one of these words."""


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def first_lines(files: list[Path]) -> list[tuple[str, str]]:
    """Return the first line of every docstring of some files, with its place."""
    return [
        (f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 1)}", text.partition("\n")[0])
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
    ]


@pytest.mark.parametrize("files", [FILES, TESTS], ids=["packages", "tests"])
def test_first_lines_name_the_thing_and_the_actor(files: list[Path]) -> None:
    """Few first lines use "what" as a noun, or tell, say and see without naming who does."""
    lines = first_lines(files)
    found = [f"{place}: {line}" for place, line in lines if WORDS.search(line)]
    assert len(lines) > 500
    assert len(found) <= LIMIT * len(lines), "\n".join(found)
