"""The sources of both packages, and the imports in them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "kernels_core").rglob("*.py"))
PLUGINS = sorted(p for p in (ROOT / "kernels_plugins").rglob("*.py") if "demo/hub" not in p.as_posix())
FILES = [*CORE, *PLUGINS]


def imports(path: Path, *, typing: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield each module that a file imports, with the names taken from it; `typing` includes those that name types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree) if typing else _executed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, [alias.name for alias in node.names]


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk everything but the code under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(node)


def has_code(path: Path) -> bool:
    """Whether a file holds more than a docstring."""
    return len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
