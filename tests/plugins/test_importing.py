"""Import of verified bytes: unique names, everything a Python package may do, and nothing left behind."""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import pickle
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kernels_core import LoadError
from kernels_plugins.hub.builds import importing
from kernels_plugins.hub.builds.importing import find_layer, import_build
from kernels_plugins.hub.builds.integrity import Build, as_build, read_files

Files = dict[str, "str | bytes"]
METADATA = '{"id": "_x", "name": "fast-layers", "version": 1, "backend": {"type": "cpu"}, "python-depends": []}'


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end without imported kernels, and let Python write byte code as it usually does."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    yield
    importing._finder.roots.clear()
    for name in [name for name in sys.modules if name.startswith("kernel_fast_layers_")]:
        del sys.modules[name]


def build(folder: Path, files: Files) -> Build:
    """Write the files of a variant and read them back, as a load does."""
    for path, content in {"metadata.json": METADATA, **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return as_build(folder, read_files(folder))


def load(folder: Path, files: Files) -> Any:
    """Write and import a variant."""
    return import_build(build(folder, files))


def leftovers() -> list[str]:
    """Name the modules of kernels that are imported."""
    return [name for name in sys.modules if name.startswith("kernel_")]


def poison(source: Path, effect: str) -> Path:
    """Put byte code beside a source file that Python would run without comparing the two."""
    other = source.with_name("poison.txt")
    other.write_text(effect)
    target = importlib.util.cache_from_source(str(source))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(other), cfile=target, dfile=str(source), doraise=True, invalidation_mode=mode)
    other.unlink()
    return Path(target)


# What a package may do


def test_package(tmp_path: Path) -> None:
    """A module says where it is from: a name made of kernel and content, its file, its package."""
    module = load(tmp_path, {"__init__.py": "from . import layers\n", "layers.py": "value = 1\n"})
    assert module.__name__.startswith("kernel_fast_layers_") and module.layers.value == 1
    assert Path(module.__file__) == tmp_path / "__init__.py" and list(module.__path__) == [str(tmp_path)]
    assert module.layers.__package__ == module.__name__ == module.__package__
    assert sys.modules[f"{module.__name__}.layers"] is module.layers


def test_inner_package(tmp_path: Path) -> None:
    """The package may lie in a folder named like the kernel, the older form."""
    files: Files = {"fast_layers/__init__.py": "from . import layers\n", "fast_layers/layers.py": "value = 2\n"}
    module = load(tmp_path, files)
    assert module.layers.value == 2 and Path(module.__file__).parent == tmp_path / "fast_layers"


def test_relative_imports(tmp_path: Path) -> None:
    """Relative imports go down, up, sideways and into folders without an `__init__.py`."""
    module = load(
        tmp_path,
        {
            "__init__.py": "from . import layers\nfrom .sub.deep import value\n",
            "layers.py": "from .sub import helper\nfrom .plain.nested.leaf import leaf\nfrom .plain import other\n",
            "sub/__init__.py": "from .. import constants\n",
            "sub/helper.py": "from ..constants import FACTOR\n",
            "sub/deep.py": "from . import helper\nfrom .. import layers\nvalue = helper.FACTOR\n",
            "plain/nested/leaf.py": "from ...constants import FACTOR as leaf\n",
            "plain/other.py": "",
            "constants.py": "FACTOR = 7\n",
        },
    )
    assert (module.value, module.layers.leaf, module.sub.constants.FACTOR) == (7, 7, 7)
    assert module.layers.other.__name__ == f"{module.__name__}.plain.other"


def test_import_later(tmp_path: Path) -> None:
    """Modules imported inside a function, long after loading, still come from the verified bytes."""
    files: Files = {
        "__init__.py": "def late():\n    from . import more\n    return more.value\n",
        "more.py": "value = 1\n",
    }
    module = load(tmp_path, files)
    (tmp_path / "more.py").write_text("value = 666\n")
    assert module.late() == 1


def test_data_files(tmp_path: Path) -> None:
    """Data files are found beside `__file__` and through importlib.resources, at every depth."""
    module = load(
        tmp_path,
        {
            "__init__.py": "from . import sub\n",
            "table.json": "[1]",
            "sub/__init__.py": "",
            "sub/table.json": "[2]",
            "plain/table.json": "[3]",
            "plain/code.py": "",
        },
    )
    assert (Path(module.__file__).parent / "table.json").read_text() == "[1]"
    assert importlib.resources.files(module).joinpath("table.json").read_text() == "[1]"
    assert importlib.resources.files(f"{module.__name__}.sub").joinpath("table.json").read_text() == "[2]"
    assert (importlib.resources.files(module) / "plain" / "table.json").read_text() == "[3]"
    assert importlib.resources.files(f"{module.__name__}.plain").joinpath("table.json").read_text() == "[3]"
    with importlib.resources.as_file(importlib.resources.files(module) / "table.json") as path:
        assert path == tmp_path / "table.json"


def test_pickle_and_source(tmp_path: Path) -> None:
    """Classes pickle by reference, and inspect shows their source."""
    source = "class Silu:\n    def forward(self, x):\n        return x\n"
    module = load(tmp_path, {"__init__.py": "from . import layers\n", "layers.py": source})
    silu = module.layers.Silu
    assert pickle.loads(pickle.dumps(silu)) is silu and type(pickle.loads(pickle.dumps(silu()))) is silu
    assert inspect.getsource(silu) == source and inspect.getsource(module.layers) == source
    assert inspect.getsourcefile(silu) == str(tmp_path / "layers.py")


def test_extension_module(tmp_path: Path) -> None:
    """A compiled extension module is a submodule like any other."""
    spec = importlib.util.find_spec("markupsafe._speedups")  # small, and torch brings it
    if spec is None or not spec.origin or not spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        pytest.skip("there is no extension module to try this with")
    found = Path(spec.origin)
    module = load(tmp_path, {"__init__.py": "from . import _speedups\n", found.name: found.read_bytes()})
    assert Path(module._speedups.__file__) == tmp_path / found.name
    assert module._speedups.__name__ == f"{module.__name__}._speedups" and callable(module._speedups._escape_inner)


def test_reload_and_find_spec(tmp_path: Path) -> None:
    """The tools of importlib find a kernel's modules, and reload runs the verified bytes again."""
    module = load(tmp_path, {"__init__.py": "from . import layers\n", "layers.py": "value = []\n"})
    before = module.layers.value
    (tmp_path / "layers.py").write_text("value = 666\n")
    assert importlib.reload(module.layers).value == [] and module.layers.value is not before
    spec = importlib.util.find_spec(f"{module.__name__}.layers")
    assert spec is not None and spec.origin == str(tmp_path / "layers.py")


# Unique names


def test_two_revisions(tmp_path: Path) -> None:
    """Two contents of one kernel live side by side, down to their submodules."""
    old, new = (
        load(tmp_path / name, {"__init__.py": "from . import layers\n", "layers.py": f"value = {name!r}\n"})
        for name in ("old", "new")
    )
    assert (old.layers.value, new.layers.value) == ("old", "new") and old.__name__ != new.__name__


def test_same_content(tmp_path: Path) -> None:
    """Equal content is one module, wherever it lies, and is run once."""
    files: Files = {"__init__.py": "state = []\n"}
    assert load(tmp_path / "one", files) is load(tmp_path / "two", files)


@pytest.mark.parametrize("change", ["content", "name", "new file"])
def test_any_difference_counts(tmp_path: Path, change: str) -> None:
    """One byte, one name or one file more makes another module, also in data files."""
    other: Files = {"content": {"a.bin": "2"}, "name": {"b.bin": "1"}, "new file": {"a.bin": "1", "b": ""}}[change]  # type: ignore[assignment]
    one = load(tmp_path / "one", {"__init__.py": "", "a.bin": "1"})
    assert load(tmp_path / "two", {"__init__.py": "", **other}).__name__ != one.__name__


# Byte code, and files that nobody checked


@pytest.mark.parametrize("where", ["__init__.py", "layers.py", "plain/leaf.py"])
def test_poisoned_byte_code(tmp_path: Path, where: str) -> None:
    """Byte code on disk is not run, whatever the source beside it, and none is written."""
    files: Files = {
        "__init__.py": "from . import layers\nfrom .plain import leaf\nvalue = 1\n",
        "layers.py": "value = 1\n",
        "plain/leaf.py": "value = 1\n",
    }
    variant = build(tmp_path, files)
    poisoned = poison(tmp_path / where, "value = 666\nlayers = leaf = None\n")
    before = poisoned.read_bytes()
    module: Any = import_build(variant)
    assert (module.value, module.layers.value, module.leaf.value) == (1, 1, 1)
    assert poisoned.read_bytes() == before
    assert [path for path in tmp_path.rglob("*.pyc") if path != poisoned] == []


def test_no_byte_code_written(tmp_path: Path) -> None:
    """An import leaves the folder as it was."""
    variant = build(tmp_path, {"__init__.py": "from . import layers\n", "layers.py": ""})
    before = sorted(tmp_path.rglob("*"))
    import_build(variant)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["extra.py", "extra.pyc", "extra/__init__.py"])
def test_unverified_files(tmp_path: Path, name: str) -> None:
    """Files that were not verified cannot be imported, also not byte code without a source."""
    variant = build(
        tmp_path, {"__init__.py": "try:\n    from .extra import value\nexcept ImportError:\n    value = None\n"}
    )
    target = tmp_path / name
    target.parent.mkdir(exist_ok=True)
    if name.endswith(".pyc"):
        (tmp_path / "text").write_text("value = 666\n")
        py_compile.compile(str(tmp_path / "text"), cfile=str(target), doraise=True)
    else:
        target.write_text("value = 666\n")
    module: Any = import_build(variant)
    assert module.value is None
    with pytest.raises(ModuleNotFoundError):
        importlib.util.find_spec(f"{module.__name__}.extra")


def test_changed_after_check(tmp_path: Path) -> None:
    """A file that changes between the check and the import is imported as it was checked."""
    variant = build(tmp_path, {"__init__.py": "from . import layers\n", "layers.py": "value = 1\n"})
    (tmp_path / "layers.py").write_text("value = 666\n")
    (tmp_path / "__init__.py").write_text("class layers:\n    value = 666\n")
    assert import_build(variant).layers.value == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_link_to_the_outside(tmp_path: Path, kind: str) -> None:
    """A link made after the check leads nowhere."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "evil.py").write_text("value = 666\n")
    variant = build(tmp_path / "kernel", {"__init__.py": "from .link.evil import value\nfrom .evil import value\n"})
    link, target = ("evil.py", "evil.py") if kind == "file" else ("link", ".")
    (tmp_path / "kernel" / link).symlink_to(tmp_path / "outside" / target)
    with pytest.raises(LoadError, match="No module named"):
        import_build(variant)


def test_linked_folder_is_no_part(tmp_path: Path) -> None:
    """A folder that is a link to elsewhere is not read, so nothing in it is ever imported."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "evil.py").write_text("value = 666\n")
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "link").symlink_to(tmp_path / "outside")
    variant = build(tmp_path / "kernel", {"__init__.py": "from .link import evil\n"})
    assert sorted(variant.files) == ["__init__.py", "metadata.json"]
    with pytest.raises(LoadError, match="No module named"):
        import_build(variant)


# Failures


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_package_at_all", "pip install no_such_package_at_all"),
        ("import no_such_package_at_all.sub", "pip install no_such_package_at_all$"),
        ("def broken(:", "SyntaxError in .*layers.py, line 1"),
        ("\tx = 1\n  y = 2", "IndentationError in .*layers.py"),
        ("x = '\0'", "layers.py|null bytes"),
        (b"# -*- coding: nonsense -*-\n", "nonsense"),
        (b"x = '\xff'\n", "layers.py|utf-8"),
        ("from . import nothing", "nothing"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise RecursionError('deep')", "RecursionError: deep"),
    ],
)
def test_failed_import(tmp_path: Path, source: str | bytes, message: str) -> None:
    """A failed import names its error and leaves nothing in sys.modules; after a fix, it works."""
    variant = build(
        tmp_path, {"__init__.py": "from . import early\nfrom . import layers\n", "early.py": "", "layers.py": source}
    )
    finders = len(sys.meta_path)
    with pytest.raises(LoadError, match=message):
        import_build(variant)
    assert leftovers() == [] and importing._finder.roots == {} and len(sys.meta_path) <= finders + 1
    with pytest.raises(LoadError, match=message):
        import_build(variant)
    assert load(tmp_path, {"layers.py": "value = 1\n"}).layers.value == 1


def test_missing_submodule(tmp_path: Path) -> None:
    """A missing module of the kernel itself is not reported as a package to install."""
    with pytest.raises(LoadError, match="nothing") as caught:
        load(tmp_path, {"__init__.py": "from .nothing import x\n"})
    assert "pip install" not in str(caught.value)


def test_interrupt(tmp_path: Path) -> None:
    """An interrupt goes through unchanged, and leaves nothing behind either."""
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, {"__init__.py": "from . import early\nraise KeyboardInterrupt\n", "early.py": ""})
    assert leftovers() == []


_FORK = """
import os, sys, threading
from pathlib import Path
from kernels_core import LoadError
from kernels_plugins import get_local_kernel

folder = Path(sys.argv[1])
threading.begun, threading.go_on = threading.Event(), threading.Event()
first = threading.Thread(target=get_local_kernel, args=(folder,))
first.start()
threading.begun.wait()
child = os.fork()
if child == 0:
    try:
        get_local_kernel(folder)
    except LoadError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
status = os.waitpid(child, 0)[1]
threading.go_on.set()
first.join()
print(get_local_kernel(folder).whole, flush=True)
sys.exit(status != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_during_an_import(tmp_path: Path) -> None:
    """A child that is forked while another thread imports a kernel gets an error, no half of it, and does not hang."""
    source = "import threading\nthreading.begun.set()\nthreading.go_on.wait()\nwhole = True\n"
    build(tmp_path / "build/torch-universal", {"__init__.py": source})
    script = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    error, whole = run.stdout.splitlines()
    assert "forked while another thread imported it" in error and "spawn" in error and whole == "True"


def test_nothing_to_import(tmp_path: Path) -> None:
    """A variant without a package says which files it would need."""
    with pytest.raises(LoadError, match=r"neither __init__.py nor fast_layers/__init__.py"):
        load(tmp_path, {"other/__init__.py": ""})


def test_only_sources_are_kept(tmp_path: Path) -> None:
    """Once imported, a kernel's large files do not stay in memory."""
    size = 3_141_593
    load(tmp_path, {"__init__.py": "", "weights.bin": b"\1" * size})
    gc.collect()
    assert not [
        thing for files in importing._finder.roots.values() for thing in files[0].files.values() if len(thing) == size
    ]


# Layers


def module_of(source: str) -> ModuleType:
    """Make a module whose source is given."""
    module = ModuleType("made")
    exec(source, module.__dict__)
    return module


def test_find_layer() -> None:
    """A layer is found by name in a module, a class or any object; an unknown one names those there are."""
    source = "class layers:\n    class Silu: ...\n    def gelu(x): ...\n    number = 1\n"
    module = module_of(source)
    assert find_layer(module, "Silu") is module.layers.Silu
    with pytest.raises(LoadError, match=r"no 'Nope': there are .*Silu"):
        find_layer(module, "Nope")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "defines no `layers`"),
        ("layers = None", "defines no `layers`"),
        ("layers = {}", "no 'Silu': there are none"),
        ("layers = 3", "no 'Silu': there are none"),
        (
            "class Lazy:\n    def __getattr__(self, name): raise RuntimeError('lazy')\nlayers = Lazy()",
            "RuntimeError: lazy",
        ),
        ("def __getattr__(name): raise ImportError('lazy')", "ImportError: lazy"),
    ],
)
def test_bad_layers(source: str, message: str) -> None:
    """Whatever `layers` is or does, a layer that is not there is a LoadError."""
    with pytest.raises(LoadError, match=message):
        find_layer(module_of(source), "Silu")


def test_imported_helpers_are_not_offered(tmp_path: Path) -> None:
    """The names offered are the kernel's own, not those that its layers import."""
    files: Files = {"__init__.py": "from . import layers\n", "layers.py": "from pathlib import Path\nclass Silu: ...\n"}
    with pytest.raises(LoadError, match=r"there are Silu$"):
        find_layer(load(tmp_path, files), "Nope")


def test_copied_variant(tmp_path: Path) -> None:
    """A variant that is moved before its import is imported from the bytes that were read."""
    variant = build(tmp_path / "one", {"__init__.py": "from . import layers\n", "layers.py": "value = 1\n"})
    shutil.rmtree(tmp_path / "one")
    assert import_build(variant).layers.value == 1
