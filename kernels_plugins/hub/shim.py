"""What published kernels import to get the kernels that they depend on: `from kernels import get_kernel_dep`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .dependency import get_kernel_dep, is_lending

_NAMES = ("kernels", "kernels.deps")
_imported: dict[str, ModuleType] = {}


class _StandIn(ModuleType):
    """Stands for a module of the library `kernels`, whether or not that is installed."""

    def __init__(self, name: str, path: list[str]) -> None:
        super().__init__(name)
        self.__path__ = path  # modules of the library that nothing stands for are found where they are

    def get_kernel_dep(self, repo_id: str) -> Any:
        """Give a kernel that is being imported what it depends on; leave all others to the library."""
        if is_lending():
            return get_kernel_dep(repo_id)
        return _real(self.__name__).get_kernel_dep(repo_id)

    def __getattr__(self, name: str) -> Any:
        """Take everything else from the library."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


@contextmanager
def stand_in() -> Iterator[None]:
    """Let `import kernels` give the stand-in, while a kernel is imported that depends on others."""
    before = {name: sys.modules.get(name) for name in _NAMES}
    known = before["kernels"]
    spec = importlib.util.find_spec("kernels") if known is None else None
    path = list(getattr(known, "__path__", ()) or (spec and spec.submodule_search_locations) or ())
    sys.modules.update({name: _StandIn(name, path) for name in _NAMES})
    try:
        yield
    finally:
        for name, module in before.items():
            if isinstance(sys.modules.get(name), _StandIn):
                _put(name, module or _imported.get(name))


def _real(name: str) -> Any:
    """Import a module of the library itself."""
    away = {n: sys.modules.pop(n) for n in _NAMES if isinstance(sys.modules.get(n), _StandIn)}
    try:
        found = importlib.import_module(name)
        _imported.update({n: sys.modules[n] for n in _NAMES if n in sys.modules})
        return found
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}. While a kernel is imported, `kernels` has get_kernel_dep alone") from error
    finally:
        sys.modules.update(away)


def _put(name: str, module: ModuleType | None) -> None:
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module
