"""The walls of docs/house.md: where code lives, and which side effects a room may have."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from source_tree import FILES, ROOT, has_code, imports
from torch import nn

import kernels_core
import kernels_plugins
from kernels_core import use_kernel_forward_from_hub
from kernels_plugins import use_kernel_mapping

PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")

MAX_LINES = 400
MAX_FILES = 12
LARGER = {"kernels_core": 27, "kernels_core/guards": 14}
"""Folders with more files, and how many at most: docs/house.md says why."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def listed(title: str) -> set[str]:
    """Return the lines of a block of the page."""
    (block,) = re.findall(rf'^```text title="{title}"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
    return set(block.split())


def rows() -> Iterator[str]:
    """Yield each file that the page has a row for; the heading above a table names the folder."""
    for package in ("kernels_core", "kernels_plugins"):
        section = PAGE.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
        for part in section.split("\n### ")[1:]:
            title, *lines = part.splitlines()
            folder = re.search(r"`([\w/]+/)`$", title)
            for line in lines:
                cell = line.split("|")[1] if line.startswith("| `") else ""
                yield from (
                    f"{package}/{folder[1] if folder else ''}{name}" for name in re.findall(r"`(\w+\.py)`", cell)
                )


def test_every_file_has_a_row() -> None:
    """Each file of the two packages is in one table of the page, unless it holds only a docstring."""
    named = Counter(rows())
    assert set(named) == {relative(path) for path in FILES if path.name != "__init__.py" or has_code(path)}
    assert set(named.values()) == {1}


def test_files_are_short() -> None:
    """No file has more than 400 lines."""
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name for name, lines in lengths.items() if lines > MAX_LINES}


def test_folders_are_small() -> None:
    """No folder has more than 12 files with code, but for those that are named here."""
    counts = Counter(relative(path.parent) for path in FILES if has_code(path))
    assert {folder for folder, count in counts.items() if count > MAX_FILES} == LARGER.keys()
    assert not {folder: count for folder, count in counts.items() if count > LARGER.get(folder, MAX_FILES)}


def test_one_variable_bounds_hangs() -> None:
    """Tests give processes and threads no bound of their own: PYTEST_TIMEOUT sets all, also `patience.PATIENCE`."""
    bound = re.compile(r"\btimeout=[1-9]|\.(join|wait|result|acquire)\([1-9]|monotonic\(\) \+ \d")
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert not {f"{relative(path)}: {found[0]}" for path, text in texts.items() if (found := bound.search(text))}


IO_MODULES = {"ftplib", "http", "multiprocessing", "shutil", "socket", "sqlite3", "ssl", "subprocess", "tempfile"}
IO_METHODS = {
    *("glob", "iterdir", "mkdir", "open", "read_bytes", "read_text", "rename", "rglob", "rmdir", "symlink_to", "touch"),
    *("unlink", "write_bytes", "write_text"),
}
IO_OF_OS = {
    *("execv", "fork", "link", "listdir", "makedirs", "mkdir", "open", "popen", "remove", "rename", "replace", "rmdir"),
    *("scandir", "symlink", "system", "truncate", "unlink"),
}


def side_effects(path: Path) -> set[str]:
    """Return the names that a file uses to reach files, sockets and processes."""
    found = {module for module, _ in imports(path) if module.split(".")[0] in IO_MODULES or module == "urllib.request"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("open")
        elif isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id == "os"
            if node.attr in (IO_OF_OS if of_os else IO_METHODS):
                found.add(node.attr)
    return found


def test_few_files_do_io() -> None:
    """Only the files that the page lists read, write, connect or start processes; and each of them does."""
    assert {relative(path) for path in FILES if side_effects(path)} == listed("Files that do I/O")


def test_few_files_import_the_client_of_the_hub() -> None:
    """Only the files that the page lists import huggingface_hub, and each of them does."""
    importing = {relative(p) for p in FILES if any(m.split(".")[0] == "huggingface_hub" for m, _ in imports(p))}
    assert importing == listed("Files that import huggingface_hub")


def test_nothing_imports_the_local_hub_unasked() -> None:
    """The local Hub is a tool: besides itself, only the demo and the path that documentation gives import it."""
    importing = {relative(p) for p in FILES if any(m.startswith("kernels_plugins.local_hub") for m, _ in imports(p))}
    others = {name for name in importing if not re.match("kernels_plugins/(local_hub|demo)/", name)}
    assert others == {"kernels_plugins/hub/testing.py"}


@pytest.mark.parametrize("package", ["kernels_core", "kernels_plugins"])
def test_no_two_classes_have_one_name(package: str) -> None:
    """A name of a class is used once in a package."""
    classes = Counter(
        node.name
        for path in FILES
        if relative(path).startswith(f"{package}/")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not {name for name, count in classes.items() if count > 1}


DECISIONS = re.findall(r"^\| ([^|]+\?) \| `([\w/]+\.py)` \| `([\w.]+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("file", "function"), [row[1:] for row in DECISIONS], ids=[row[0] for row in DECISIONS])
def test_who_decides(file: str, function: str) -> None:
    """Each row of the table of decisions names a function that is in that file."""
    node: ast.AST | None = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in function.split("."):
        inside = {n.name: n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        node = inside.get(name)
    assert isinstance(node, ast.FunctionDef), f"{file} has no {function}: correct the row in docs/house.md"


def test_the_table_of_decisions_is_read() -> None:
    """Every row of that table has the form that the test above understands."""
    table = PAGE.partition("\n## Where is it decided?\n")[2].partition("\n## ")[0]
    assert len(DECISIONS) == len(re.findall(r"^\| ", table, re.MULTILINE)) - 1 > 10


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
def test_a_warm_call_runs_no_function_of_ours(grad: bool) -> None:
    """Once a kernel is decided and proven, a call runs the generated forward and the kernel, and nothing between."""

    @use_kernel_forward_from_hub("Warm")
    class Warm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add(1)

    ran: list[str] = []
    packages = [str(Path(p.__file__).parent) for p in (kernels_core, kernels_plugins)]

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            name = frame.f_code.co_filename
            ours = name.startswith(("<kernels_core", *packages)) or frame.f_code is Kernel.forward.__code__
            ran.extend([f"{name}:{frame.f_code.co_name}"] if ours else [])

    layer, x = Warm(), torch.ones(2, requires_grad=True)
    with use_kernel_mapping({"Warm": {"cpu": Kernel}}):
        layer(x).sum().backward()
        with torch.set_grad_enabled(grad):
            layer(x)
            sys.setprofile(note)
            try:
                layer(x)
            finally:
                sys.setprofile(None)
    generated, kernel = ran
    assert re.match(r"<kernels_core forward \d+ of .*Warm>:forward$", generated), generated
    assert kernel == f"{__file__}:forward"
