"""Imports go one way, and the public names are those that are documented."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import CORE, FILES, PLUGINS, ROOT, has_code, imports

import kernels_core
import kernels_core.replay


@functools.cache
def order(package: str) -> dict[str, int]:
    """Return the place of each module of a package in the import order that docs/house.md gives."""
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf'title="Import order of {package}"\n(.*?)\n```', page, re.DOTALL)
    names = [name.strip() for name in listed.split("<")]
    assert len(set(names)) == len(names), "a module is listed twice"
    return {f"{package}.{name}": index for index, name in enumerate(names)}


def module_name(path: Path) -> str:
    """Return the dotted name of a file's module; that of a folder within a package is the folder's."""
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(folders if name == "__init__" and len(folders) > 1 else [*folders, name])


def modules_imported(path: Path, *, typing: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports from its own package, as the import order names them."""
    package = path.relative_to(ROOT).parts[0]
    places = order(package)
    for module, names in imports(path, typing=typing):
        if module == package or module.startswith(f"{package}."):
            for name in names or [""]:
                found = f"{module}.{name}" if f"{module}.{name}" in places else module
                yield f"{package}.__init__" if found == package else found


UPWARD = {
    # The values that travel name the errors which carry them: a circle of types, for annotations only.
    ("kernels_core.errors", "kernels_core.resolution"),
    ("kernels_core.errors", "kernels_core.models.receipt_row"),
}
"""Imports against the order; an entry that no file needs any more is an error."""


@pytest.mark.parametrize("package", ["kernels_core", "kernels_plugins"])
def test_each_module_has_a_place(package: str) -> None:
    """The orders in docs/house.md name each module with code, and no other."""
    assert order(package).keys() == {
        module_name(p) for p in FILES if p.parts[len(ROOT.parts)] == package and has_code(p)
    }


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    """A module imports only modules that stand before it in docs/house.md, to name types included."""
    places = order(path.relative_to(ROOT).parts[0])
    own = module_name(path)
    upward = {m for m in modules_imported(path, typing=True) if places[m] >= places.get(own, -1)}
    assert {(own, module) for module in upward} == {entry for entry in UPWARD if entry[0] == own}


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_nothing_imports_testing_or_cli(path: Path) -> None:
    """No module of the core imports the kit or the command line, except `python -m kernels_core`."""
    if path.stem != "__main__":
        assert not {"kernels_core.testing", "kernels_core.cli"} & set(modules_imported(path))


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


def words(path: Path) -> Iterator[str]:
    """Yield each text, attribute and keyword that stands in the code of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg


@functools.cache
def marks() -> frozenset[str]:
    """Return the names of attributes that the core puts on classes, functions and frames of others."""
    found = {word for path in CORE for word in words(path) if re.fullmatch(r"_?kernels?_[a-z_]+", word)}
    hooks = {name for name in vars(kernels_core.hookspecs) if name.startswith("kernels_")}
    return frozenset(
        found - hooks - {"kernels_core", "kernels_plugins", "kernels_priority"}
    )  # the last is for plugins to set


def attributes_by_literal(path: Path) -> Iterator[str]:
    """Yield the attributes that a file reaches by `getattr` and the like with a literal name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) and len(node.args) > 1 else ""
        if called in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
            yield str(node.args[1].value)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plugins_reach_no_attribute_of_the_core_by_its_name(path: Path) -> None:
    """Plugins neither name a mark of the core, as a text, attribute or keyword, nor get a public one by its text."""
    classes = [value for name in kernels_core.__all__ if isinstance(value := getattr(kernels_core, name), type)]
    public = {name for cls in classes for name in (*vars(cls), *getattr(cls, "__annotations__", {}))}
    of_others = {"name", "dtype"}  # modules, errors and tensors have these, too
    public = {name for name in public if not name.startswith("_")} - of_others
    assert {"kernels_layer", "kernels_frozen", "kernels_functions"} <= marks() and "resolution" in public
    reached = marks() & set(words(path)) | public & set(attributes_by_literal(path))
    assert reached == set()


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
    """Each name that the issue promises can be imported."""
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
    allowed = {"torch", "pluggy", "importlib_metadata", "packaging", "tomli", "typer", "rich", "pytest", "kernels_core"}
    for path in CORE:
        roots = {module.split(".")[0] for module, _ in imports(path)}
        assert roots <= allowed | set(sys.stdlib_module_names), path.name
