"""`kernels_plugins` imports a public name when it is first used, whatever was imported before, and by any thread."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import importlib_metadata
import pytest
from fresh_process import run_python

import kernels_core
import kernels_core.replay
import kernels_plugins

SOURCE = Path(kernels_plugins.__file__)
OWN = sorted(set(kernels_plugins.__all__) - set(kernels_core.__all__))
PUBLIC = [
    (package, name)
    for package in (kernels_core, kernels_core.replay, kernels_plugins)
    for name in (OWN if package is kernels_plugins else package.__all__)
    for value in [inspect.unwrap(getattr(package, name))]
    if isinstance(value, type) or inspect.isroutine(value)
]
"""Classes and functions; values such as a table or a marker do not say where they come from."""


def run(program: str, *, has_torch: bool = True, **variables: str) -> str:
    """Run a program in a process of its own, which has imported PyTorch or not, and return its output."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}
    environment.pop("KERNELS_CANARY", None)
    if has_torch:
        done = run_python("-c", program, environment=environment, folder=Path.cwd())
    else:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- What is loaded ------------------------------------------------------------------------------

LOADED = "print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'kernels_plugins'))"
ENTRY_POINTS = [
    point.module
    for point in importlib_metadata.entry_points(group="kernels_core")
    if point.module.startswith("kernels_plugins.")
]


def test_importing_the_package_loads_nothing_else() -> None:
    """`import kernels_plugins` loads no other module of its own, no torch, and nothing else that is not Python's."""
    program = "import sys; before = set(sys.modules); import kernels_plugins; "
    program += "print({name.partition('.')[0] for name in sys.modules.keys() - before} - set(sys.stdlib_module_names))"
    assert run(program, has_torch=False) == "{'kernels_plugins'}"


def test_a_mapping_loads_one_plugin() -> None:
    """With `KERNELS_PLUGINS=mapping`, a registered mapping and a call that it serves load two modules."""
    program = """
import sys, torch, kernels_core, kernels_plugins as kernels
@kernels_core.use_kernel_forward_from_hub("Scale")
class Scale(torch.nn.Module):
    def forward(self, x):
        return x * 2
class Fast(torch.nn.Module):
    def forward(self, x):
        return x + x + 1
kernels.register_kernel_mapping({"Scale": {"cpu": Fast}})
assert Scale()(torch.ones(1)).item() == 3
"""
    assert run(program + LOADED, KERNELS_PLUGINS="mapping") == "kernels_plugins kernels_plugins.mapping"


def test_discovery_loads_entry_points_only() -> None:
    """Finding all plugins loads the modules that are entry points, their packages, and two that these need."""
    found = run(f"import sys, kernels_core; kernels_core.plugin_manager().plugins(); {LOADED}").split()
    packages = {".".join(place.split(".")[:count]) for place in ENTRY_POINTS for count in (1, 2, 3)}
    assert len(ENTRY_POINTS) == 20
    assert set(found) == {*ENTRY_POINTS, *packages, "kernels_plugins.commands", "kernels_plugins.numerics.wanted"}


# --- The table -----------------------------------------------------------------------------------


def typed() -> dict[str, str]:
    """Return where the block for type checkers imports each name from."""
    (block,) = (
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    return {
        alias.name: "." * node.level + (node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_table_block_and_all_agree() -> None:
    """The table, the block for type checkers and `__all__` have the same names, from the same modules."""
    assert typed() == kernels_plugins._HOMES
    assert sorted(kernels_plugins._HOMES) == sorted(kernels_plugins.__all__)
    assert sum(len(names.split()) for names in kernels_plugins._NAMES.values()) == len(kernels_plugins._HOMES)


@pytest.mark.parametrize("name", kernels_plugins.__all__)
def test_each_name_is_the_object_of_its_module(name: str) -> None:
    """A name is the object that its module has, and stays it."""
    value = getattr(kernels_plugins, name)
    home = importlib.import_module(kernels_plugins._HOMES[name], "kernels_plugins")
    assert value is getattr(home, name) is getattr(kernels_plugins, name)


def test_dir_lists_what_was_not_imported_yet() -> None:
    """`dir` has every public name before it is imported; nothing else appears by looking."""
    program = "import kernels_plugins, sys; print(set(kernels_plugins.__all__) <= set(dir(kernels_plugins)))"
    assert (
        run(f"{program}; print('torch' in sys.modules, 'kernels_core' in sys.modules)", has_torch=False)
        == "True\nFalse False"
    )


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that is not public is an error that names it, and Python suggests the right one."""
    with pytest.raises(AttributeError, match="module 'kernels_plugins' has no attribute 'get_kernal'") as caught:
        kernels_plugins.get_kernal  # type: ignore[attr-defined]  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("get_kernal", kernels_plugins)
    with pytest.raises(ImportError, match="cannot import name 'get_kernal' from 'kernels_plugins'"):
        exec("from kernels_plugins import get_kernal")


def test_star_imports_everything() -> None:
    """`from kernels_plugins import *` gives exactly the public names."""
    program = "from kernels_plugins import *; import kernels_plugins; print(set(kernels_plugins.__all__) - set(dir()))"
    assert run(program) == "set()"


# --- Sub-packages with the names of public names --------------------------------------------------

HOMONYMS = [
    name for name in kernels_plugins.__all__ if any((SOURCE.parent / place).exists() for place in (name, f"{name}.py"))
]


def test_there_are_homonyms() -> None:
    """Four public names are those of sub-packages."""
    assert HOMONYMS == ["bisect", "canary", "consistency", "numerics"]


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import kernels_plugins.{0}.plugin",
        "import kernels_plugins.{0} as found; assert not hasattr(found, '__path__'), 'the sub-package'",
        "import kernels_core; kernels_core.plugin_manager().plugins()",
        "import importlib, kernels_plugins; importlib.reload(kernels_plugins)",
    ],
)
def test_public_name_wins_over_sub_package(before: str) -> None:
    """The name gives the function or class, before and after the sub-package is imported, and re-imported."""
    program = "\n".join(before.format(name) for name in HOMONYMS)
    for name in HOMONYMS:
        check = f"from kernels_plugins import {name}; import kernels_plugins, sys; "
        check += f"assert {name} is kernels_plugins.{name} and callable({name}), {name}; "
        program += f"\n{check}import kernels_plugins.{name}.plugin; {check}"
        program += f"del sys.modules['kernels_plugins.{name}']; import kernels_plugins.{name}; {check}"
    assert run(f"{program}print('right')") == "right"


def test_other_attributes_can_be_set() -> None:
    """A test of a user may replace a public name, and a sub-package without a homonym is an attribute as ever."""
    program = (
        "import kernels_plugins, unittest.mock as mock\n"
        "with mock.patch('kernels_plugins.bisect', 3): assert kernels_plugins.bisect == 3\n"
        "import kernels_plugins.hub.source\n"
        "print(kernels_plugins.bisect.__qualname__, kernels_plugins.hub.source.LayerRepository.__qualname__)"
    )
    assert run(program) == "bisect LayerRepository"


def test_threads_get_one_object() -> None:
    """Threads that use names for the first time together get the same objects, while sub-packages are imported."""
    program = """
import importlib, threading, kernels_core, kernels_plugins
names, found, barrier = kernels_plugins.__all__, [], threading.Barrier(16)
def use(number):
    barrier.wait()
    if number % 4 == 0:
        importlib.import_module("kernels_plugins." + ("bisect", "canary")[number % 8 // 4] + ".plugin")
    turned = names[number * 3:] + names[:number * 3]
    found.append({name: getattr(kernels_plugins, name) for name in (turned if number % 2 else turned[::-1])})
threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found), all(other[name] is found[0][name] for other in found for name in names))
"""
    assert run(program) == "16 True"


# --- What says where it comes from ----------------------------------------------------------------


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_public_names_say_that_they_come_from_their_package(package: ModuleType, name: str) -> None:
    """Each public class and function has the package as its `__module__`, and is found there."""
    value = getattr(package, name)
    assert value.__module__ == package.__name__
    assert getattr(sys.modules[value.__module__], value.__qualname__) is value
    assert pickle.loads(pickle.dumps(value)) is value


CLASSES = [(package, name) for package, name in PUBLIC if isinstance(getattr(package, name), type)]


@pytest.mark.parametrize(("package", "name"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
def test_type_hints_of_public_classes_are_found(package: ModuleType, name: str) -> None:
    """Annotations are evaluated in the module that defines a class; types of dataclass fields are, too."""
    cls = getattr(package, name)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        assert not isinstance(field.type, str)
        assert field.name in hints
    for member in vars(cls).values():
        if inspect.isfunction(member) and not member.__module__.startswith("dataclasses"):
            inspect.signature(member)


def test_pickles_of_before_and_after_the_name_is_used_are_one() -> None:
    """A value whose module was imported first is pickled, then the name is used: both pickles give equal values."""
    program = """
import pickle, sys
from kernels_plugins.hub.source import LayerRepository
import kernels_plugins, kernels_core
one = LayerRepository("acme/silu", layer_name="Silu", version=1)
before = pickle.dumps(one)
assert kernels_plugins.LayerRepository is LayerRepository and LayerRepository.__module__ == "kernels_plugins"
after = pickle.dumps(one)
assert b"hub.source" not in after and pickle.loads(before) == pickle.loads(after) == one
error = kernels_core.PluginLoadError("broken", plugin="acme")
values = [one, kernels_core.Mode.TRAINING | kernels_core.Mode.TORCH_COMPILE, kernels_core.Cause.MODE, error]
print(pickle.dumps(values).hex())
"""
    dumped = run(program)
    load = "import pickle, sys; one, mode, cause, error = pickle.loads(bytes.fromhex(sys.argv[1])); "
    load += "print(one, mode == type(mode).TRAINING | type(mode).TORCH_COMPILE, "
    load += "cause.name, type(error), error.plugin, sep='; ')"
    done = run_python("-c", load, dumped, environment=os.environ, folder=Path.cwd())
    assert done.stdout.strip() == (
        "LayerRepository('acme/silu', layer_name='Silu', version=1); True; MODE; "
        "<class 'kernels_core.PluginLoadError'>; acme"
    ), done.stderr


def test_names_that_are_imported_from_their_modules_first() -> None:
    """Each module of the table sets the public path of its names itself: pickles of them have no private path."""
    program = """
import importlib, inspect, pickle, kernels_plugins
for place, names in kernels_plugins._NAMES.items():
    module = importlib.import_module(place, "kernels_plugins")
    for name, value in [(name, getattr(module, name)) for name in names.split()]:
        if isinstance(value, type) or inspect.isroutine(value):
            package = "kernels_plugins" if place.startswith(".") else place
            assert value.__module__ == package, name
            assert pickle.loads(pickle.dumps(value)) is value is getattr(kernels_plugins, name), name
            assert inspect.isclass(value) or name in inspect.getsource(value), name
print("right")
"""
    assert run(program) == "right"


def test_errors_of_plugins_say_where_they_come_from_unasked() -> None:
    """An error that a public function raises names its public path, although the name of the error was never used."""
    program = "import kernels_plugins; kernels_plugins.bisect; import sys; "
    program += "print(sys.modules['kernels_plugins.bisect.result'].BisectError.__module__)"
    assert run(program) == "kernels_plugins"
