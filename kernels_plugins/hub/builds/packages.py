"""The Python packages that kernels may need: `python-depends` in their metadata."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from ..errors import PackageError, UnknownError

Package = tuple[str, str | None]
"""The name to install, and the module to import; None if there is none, as for libraries that are not Python."""

_GENERAL: dict[str, Package] = {
    "einops": ("einops", "einops"),
    "helion": ("helion", "helion"),
    "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
}
_OF_BACKEND: dict[str, dict[str, Package]] = {
    "cuda": {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": ("nki", "nki")},
    "xpu": {"onednn": ("onednn-devel", None)},
}


def check_packages(names: Iterable[str], backends: Iterable[str]) -> None:
    """Refuse a kernel whose Python packages are not installed.

    Example:
        >>> check_packages(["onednn"], ["cpu"])
        Traceback (most recent call last):
        ...
        kernels_plugins.hub.errors.UnknownError: it needs the Python package ...onednn..., which kernels for ...
    """
    kinds = tuple(dict.fromkeys(backends))
    known = dict(_GENERAL)
    for backend in kinds:
        known |= _OF_BACKEND.get(backend, {})
    missing = []
    for name in names:
        if name not in known:
            raise UnknownError(
                f"it needs the Python package {name!r}, which kernels for {' and '.join(kinds)} may not: those that "
                f"may be needed are {', '.join(sorted(known))}. Tell its publisher, or upgrade kernels-core"
            )
        package, module = known[name]
        if module is not None and not _is_installed(module):
            missing.append(package)
    if missing:
        command = f"pip install {' '.join(dict.fromkeys(missing))}"
        raise PackageError(f"it needs Python packages that are not installed. Install with: {command}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
