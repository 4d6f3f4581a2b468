"""Imports go one way, and the public names are what they are meant to be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernels_core
import kernels_core.replay

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "kernels_core").rglob("*.py"))
PLUGINS = sorted(p for p in (ROOT / "kernels_plugins").rglob("*.py") if "demo/hub" not in p.as_posix())


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each module that a file imports when it runs, with the names taken from it."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, [alias.name for alias in node.names]


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk everything but what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(node)


def order() -> dict[str, int]:
    """Return the place of each module of the core in the import order that docs/house.md gives."""
    page = (ROOT / "docs" / "house.md").read_text()
    (listed,) = re.findall(r'title="Import order of kernels_core"\n(.*?)\n```', page, re.DOTALL)
    return {f"kernels_core.{name.strip()}": index for index, name in enumerate(listed.split("<"))}


def module_name(path: Path) -> str:
    """Return the dotted name of a file's module; that of a folder within the core is the folder's."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name == "kernels_core.__init__" else name.removesuffix(".__init__")


def core_modules(path: Path) -> Iterator[str]:
    """Yield the modules of kernels_core that a file imports."""
    places = order()
    for module, names in imports(path):
        if module == "kernels_core" or module.startswith("kernels_core."):
            for name in names or [""]:
                found = f"{module}.{name}" if f"{module}.{name}" in places else module
                yield "kernels_core.__init__" if found == "kernels_core" else found


def test_each_module_has_a_place() -> None:
    """The order in docs/house.md names each module of the core, and no other."""
    assert order().keys() == {module_name(path) for path in CORE}


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_core_imports_go_one_way(path: Path) -> None:
    """A module of the core imports only modules that stand before it in docs/house.md, except to name types."""
    places = order()
    upward = [module for module in core_modules(path) if places[module] >= places[module_name(path)]]
    assert upward == []


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_nothing_imports_testing_or_cli(path: Path) -> None:
    """No module of the core imports the kit or the command line, except `python -m kernels_core`."""
    if path.stem != "__main__":
        assert not {"kernels_core.testing", "kernels_core.cli"} & set(core_modules(path))


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_core_knows_neither_plugins_nor_hub(path: Path) -> None:
    """The core imports neither its plugins nor huggingface_hub, not inside a function either."""
    roots = {module.split(".")[0] for module, _ in imports(path)}
    assert not roots & {"kernels_plugins", "huggingface_hub"}


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plugins_use_public_names_alone(path: Path) -> None:
    """Plugins use names of kernels_core.__all__, as a third party would; tests also the kit, commands the printing.

    Any plugin may use the public modules `kernels_core.replay` and `kernels_core.torch_internals`; the latter may
    change with every PyTorch.
    """
    for module, names in imports(path):
        if module == "kernels_core":
            assert set(names) <= set(kernels_core.__all__), names
            assert names, "import names, so that this test can see them"
        elif module.startswith("kernels_core."):
            if module == "kernels_core.replay":
                assert set(names) <= set(kernels_core.replay.__all__), names
                continue
            allowed = {"kernels_core.testing": "testing", "kernels_core.cli": "command"}
            assert module == "kernels_core.torch_internals" or allowed.get(module) == path.stem, module
            assert not [name for name in names if name.startswith("_")], names


def test_third_party_plugin_uses_public_names_alone() -> None:
    """The example of a third party needs nothing but public names."""
    (path,) = (ROOT / "tests" / "third_party").rglob("acme_kernels.py")
    tree = ast.parse(path.read_text())
    taken = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels")
        for alias in node.names
    }
    assert taken and taken <= set(kernels_core.__all__)


def test_public_names() -> None:
    """__all__ is sorted, has no doubles, and every name is there."""
    names = kernels_core.__all__
    ascii_order = sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert names == ascii_order
    assert len(set(names)) == len(names)
    assert all(hasattr(kernels_core, name) for name in names)


def test_names_of_the_issue_are_public() -> None:
    """What the issue promises can be imported."""
    promised = {
        "use_kernel_forward_from_hub",
        "replace_kernel_forward_from_hub",
        "Device",
        "CUDAProperties",
        "ROCMProperties",
        "Mode",
        "LayerRequest",
        "Candidate",
        "Refusal",
        "Resolution",
        "hookimpl",
        "plugin_manager",
        "resolve",
        "Scope",
    }
    assert promised <= set(kernels_core.__all__)
    import kernels_plugins

    assert {"register_kernel_mapping", "use_kernel_mapping"} <= set(kernels_plugins.__all__)
    assert kernels_plugins.__all__ == sorted(kernels_plugins.__all__)


def test_standard_library_and_dependencies_only() -> None:
    """The core imports the standard library, torch, and its declared dependencies."""
    allowed = {"torch", "pluggy", "importlib_metadata", "packaging", "typer", "rich", "pytest", "kernels_core"}
    for path in CORE:
        roots = {module.split(".")[0] for module, _ in imports(path)}
        assert roots <= allowed | set(sys.stdlib_module_names), path.name
