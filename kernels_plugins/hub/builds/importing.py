"""Imports a verified build as a uniquely named module, and finds layers in it.

Python source is run from the bytes that were checked, not from the file, which may have changed since,
and byte code is neither read nor written. Extension modules, and files that a kernel opens itself, are
read from disk, where they were checked just before. The module's name is unique per content, so that two
revisions live side by side.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.readers import FileReader
from importlib.util import decode_source, spec_from_file_location
from types import CodeType, ModuleType
from typing import Any, cast

from kernels_core import KernelLayer, LoadError, error_text

from ...locks import KeyedLocks
from ..dependency import lend_kernels
from ..errors import PackageError, UnknownError
from .integrity import Build
from .shim import install_shim

_importing = KeyedLocks()
_unfinished: dict[str, threading.Thread] = {}
"""The kernels that are being imported, and by which thread: a forked child has only the thread that forked."""


class _FileLoader(InspectLoader):
    """Runs one Python file of a verified build."""

    def __init__(self, build: Build, path: str) -> None:
        self._source = build.files.get(path, b"")  # empty: a package without __init__.py
        self.path = str(build.folder / path)  # FileReader reads this attribute

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_resource_reader(self, fullname: str) -> FileReader:
        return FileReader(cast(Any, self))

    def is_package(self, fullname: str) -> bool:
        return os.path.basename(self.path) == "__init__.py"

    def get_source(self, fullname: str) -> str:
        return decode_source(self._source)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self.path)


class _Finder(MetaPathFinder):
    """Finds the modules of imported kernels among their verified files, and nothing else."""

    def __init__(self) -> None:
        self.roots: dict[str, tuple[Build, str]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if root not in self.roots:  # of all other modules, the finders after this one decide
            return None
        build, prefix = self.roots[root]
        stem = prefix + rest.replace(".", "/")
        package = f"{stem}/__init__.py" if rest else f"{stem}__init__.py"
        for candidate in (package, f"{stem}.py") if rest else (package,):
            if candidate in build.files:
                loader = _FileLoader(build, candidate)
                return spec_from_file_location(fullname, loader.path, loader=loader)
        for suffix in EXTENSION_SUFFIXES if rest else ():
            if stem + suffix in build.files:
                return spec_from_file_location(fullname, build.folder / (stem + suffix))
        # A folder of sources without __init__.py is a package, too: it runs as if it had an empty one.
        if rest and any(file.startswith(f"{stem}/") for file in build.files):
            spec = ModuleSpec(fullname, _FileLoader(build, package), is_package=True)
            spec.submodule_search_locations = [str(build.folder / stem)]
            return spec
        # The finders after this one would look on disk, and find files that were not verified.
        raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


_finder = _Finder()


def import_build(build: Build, kernels: Mapping[str, ModuleType] | None = None) -> ModuleType:
    """Import a verified build under a name that is unique to its content, and to that of its dependencies."""
    python_name = build.metadata.name.python_name
    name = f"kernel_{python_name}_{_fingerprint(build, kernels or {})}"
    with _importing.hold():
        me = threading.current_thread()
        if _unfinished.get(name, me) is not me:  # the lock is free in a forked child, and Python's own is not
            raise LoadError(
                "this process was forked while another thread imported it, so it is only half there. Load kernels "
                "before processes are forked, or start processes with the method 'spawn'"
            )
        if name in sys.modules and name in _finder.roots:
            return sys.modules[name]
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)  # the usual finders read from disk, byte code first
        inner = f"{python_name}/"
        prefix = next((p for p in ("", inner) if f"{p}__init__.py" in build.files), None)
        if prefix is None:
            raise LoadError(f"it has neither __init__.py nor {inner}__init__.py, so there is nothing to import")
        # Large libraries are mapped from disk: keep their names, not their bytes.
        kept = {path: content if path.endswith(".py") else b"" for path, content in build.files.items()}
        _finder.roots[name] = (replace(build, files=kept), prefix)
        _unfinished[name] = me
        try:
            with lend_kernels(kernels or {}), install_shim() if kernels else nullcontext():
                return importlib.import_module(name)
        except BaseException as error:
            del _finder.roots[name]
            for loaded in list(sys.modules):  # another thread may import meanwhile
                if loaded == name or loaded.startswith(f"{name}."):
                    sys.modules.pop(loaded, None)
            if not isinstance(error, Exception | SystemExit):  # an interrupt is not the kernel's
                raise
            kind = PackageError if isinstance(error, ImportError) else LoadError
            raise kind(_import_problem(error, name)) from error
        finally:
            _unfinished.pop(name, None)


def _fingerprint(build: Build, kernels: Mapping[str, ModuleType]) -> str:
    if not kernels:
        return build.fingerprint[:16]
    parts = [build.fingerprint, *(f"{repo_id}={module.__name__}" for repo_id, module in sorted(kernels.items()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _import_problem(error: BaseException, name: str) -> str:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("", name):
        return f"its import fails: {error}. If that is a package to install: pip install {package}"
    if isinstance(error, SyntaxError):
        return f"its import fails: {type(error).__name__} in {error.filename}, line {error.lineno}: {error.msg}"
    return f"its import fails: {error_text(error)}"


def find_layer(module: ModuleType, layer_name: str) -> KernelLayer:
    """Return a layer class or function of a kernel's `layers`."""
    try:
        layers: Any = getattr(module, "layers", None)
        layer: KernelLayer | None = getattr(layers, layer_name, None)
    except Exception as error:  # a kernel may import its layers when they are asked for
        raise LoadError(_import_problem(error, module.__name__)) from error
    if layers is None:
        raise UnknownError("it defines no `layers`, so it offers nothing to dispatch to")
    if layer is None:
        members = getattr(layers, "__dict__", {})
        offered = sorted(name for name, value in members.items() if _is_layer(name, value, layers))
        raise UnknownError(f"its `layers` have no {layer_name!r}: there are {', '.join(offered) or 'none'}")
    return layer


def find_function(module: ModuleType, name: str) -> KernelLayer:
    """Return the function at the top of a kernel."""
    found = getattr(module, name, None)
    if not callable(found):
        offered = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise UnknownError(f"it has no function {name!r}: there are {', '.join(offered) or 'none'}")
    function: KernelLayer = found
    return function


def _is_layer(name: str, value: object, layers: object) -> bool:
    """Whether to name it to the user: a layer of the kernel, not an import of its module `layers`."""
    if not callable(value) or name.startswith("_"):
        return False
    if not isinstance(layers, ModuleType):
        return True
    return str(getattr(value, "__module__", "")).partition(".")[0] == layers.__name__.partition(".")[0]
