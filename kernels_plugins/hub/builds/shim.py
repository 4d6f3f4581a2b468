"""The shim of the library `kernels`: published kernels do `from kernels import get_kernel_dep`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..dependency import get_kernel_dep, is_lending

_NAMES = ("kernels", "kernels.deps")
_imported: dict[str, ModuleType] = {}


class _Shim(ModuleType):
    """Replaces a module of the library `kernels`, whether or not that is installed."""

    def __init__(self, name: str, path: list[str]) -> None:
        super().__init__(name)
        self.__path__ = path  # other modules of the library are found where they are

    def get_kernel_dep(self, repo_id: str) -> Any:
        """Return a dependency to a kernel that is being imported; leave all other callers to the library."""
        if is_lending():
            return get_kernel_dep(repo_id)
        return _real(self.__name__).get_kernel_dep(repo_id)

    def __getattr__(self, name: str) -> Any:
        """Return all other names from the library."""
        if name.startswith("__"):  # Python looks for these itself; the library must not be imported for that
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


@contextmanager
def install_shim() -> Iterator[None]:
    """Let `import kernels` return the shim, while a kernel is imported that depends on others."""
    before = {name: sys.modules.get(name) for name in _NAMES}
    known = before["kernels"]
    spec = importlib.util.find_spec("kernels") if known is None else None
    path = list(getattr(known, "__path__", ()) or (spec and spec.submodule_search_locations) or ())
    sys.modules.update({name: _Shim(name, path) for name in _NAMES})
    try:
        yield
    finally:
        for name, module in before.items():
            if isinstance(sys.modules.get(name), _Shim):
                if library := module or _imported.get(name):
                    sys.modules[name] = library
                else:
                    sys.modules.pop(name)


def _real(name: str) -> Any:
    """Import a module of the library itself."""
    # Or the import would find the shim.
    away = {n: sys.modules.pop(n) for n in _NAMES if isinstance(sys.modules.get(n), _Shim)}
    try:
        found = importlib.import_module(name)
        _imported.update({n: sys.modules[n] for n in _NAMES if n in sys.modules})
        return found
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}. While a kernel is imported, `kernels` has only get_kernel_dep") from error
    finally:
        sys.modules.update(away)
