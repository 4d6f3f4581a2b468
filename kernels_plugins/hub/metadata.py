"""What a build says about itself: `metadata.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from packaging.version import InvalidVersion, Version

from kernels_core import LoadError

METADATA = "metadata.json"
SIGNATURE = "metadata.json.sigstore"

INTERFACE_LEVEL = Version("0.17")
"""Level of the kernel interface that this package implements; `kernels-minver` is compared with it."""

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
_PYTHON_PACKAGES = {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass"), "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi")}
"""Dependencies by the name that metadata uses: the distribution to install and the module to import."""


@dataclass(frozen=True)
class Metadata:
    """The part of `metadata.json` that loading depends on.

    Attributes:
        id: Identifies kernel, version and backend.
        name: Name of the kernel.
        version: Number of its version.
        backend: What it was built for, such as `cuda`.
        python_depends: Python packages that it imports.
        minver: Level of the kernel interface that it asks for.
        digest_algorithm: `sha256` or `sha512`; None without digests.
        digests: Base64 digest per file, relative to the variant; None without digests.
    """

    id: str
    name: str
    version: int
    backend: str
    python_depends: tuple[str, ...] = ()
    minver: Version | None = None
    digest_algorithm: str | None = None
    digests: Mapping[str, str] | None = None

    @property
    def python_name(self) -> str:
        """The name as a Python identifier."""
        return self.name.replace("-", "_")


def parse_metadata(content: bytes) -> Metadata:
    """Read `metadata.json`.

    Raises:
        LoadError: If it is no JSON, or lacks what is needed; says what.

    Example:
        >>> parse_metadata(b'{"id": "x"}')
        Traceback (most recent call last):
        ...
        kernels_core.errors.LoadError: metadata.json is incomplete: backend is missing. Rebuild the kernel.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{METADATA} cannot be read ({error}). Rebuild the kernel.") from error
    if not isinstance(data, dict):
        raise LoadError(f"{METADATA} holds {type(data).__name__}, not an object. Rebuild the kernel.")
    backend = _field(data, "backend", dict)
    name = _field(data, "name", str)
    if not _NAME.fullmatch(name):
        raise LoadError(f"{METADATA}: {name!r} is no kernel name ({_NAME.pattern}). Rename the kernel.")
    digest = _field(data, "digest", dict, optional=True)
    return Metadata(
        id=_field(data, "id", str),
        name=name,
        version=_field(data, "version", int),
        backend=_field(backend, "type", str, where="backend."),
        python_depends=tuple(_strings(_field(data, "python-depends", list), "python-depends")),
        minver=_minver(_field(data, "kernels-minver", str, optional=True)),
        digest_algorithm=_algorithm(digest) if digest is not None else None,
        digests=_digests(_field(digest, "files", dict, where="digest.")) if digest is not None else None,
    )


def check_metadata(metadata: Metadata) -> None:
    """Refuse a build that this process cannot run.

    Raises:
        LoadError: If it asks for a newer interface or for Python packages that are not installed.
    """
    if metadata.minver is not None and metadata.minver.release[:2] > INTERFACE_LEVEL.release[:2]:
        raise LoadError(
            f"it asks for level {metadata.minver} of the kernel interface (kernels-minver), and kernels-core "
            f"implements {INTERFACE_LEVEL}. Upgrade with: pip install --upgrade kernels-core"
        )
    missing = []
    for depends in metadata.python_depends:
        package, module = _PYTHON_PACKAGES.get(depends, (depends, depends.replace("-", "_")))
        try:
            found = find_spec(module.partition(".")[0]) is not None  # for a part, the package would be run
        except (ImportError, ValueError):
            found = False
        if not found:
            missing.append(package)
    if missing:
        command = f"pip install {' '.join(missing)}"
        raise LoadError(f"it needs Python packages that are not installed. Install with: {command}")


def _field(data: Mapping[str, Any], key: str, kind: type, *, where: str = "", optional: bool = False) -> Any:
    value = data.get(key)
    if value is None:
        if optional:
            return None
        raise LoadError(f"{METADATA} is incomplete: {where}{key} is missing. Rebuild the kernel.")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise LoadError(f"{METADATA}: {where}{key} is {value!r}, not {kind.__name__}. Rebuild the kernel.")
    return value


def _strings(values: list[Any], key: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise LoadError(f"{METADATA}: {key} is {values!r}, not a list of names. Rebuild the kernel.")
    return values


def _minver(text: str | None) -> Version | None:
    if text is None:
        return None
    try:
        return Version(text)
    except InvalidVersion as error:
        raise LoadError(f"{METADATA}: kernels-minver is {text!r}, not a version. Rebuild the kernel.") from error


def _algorithm(digest: Mapping[str, Any]) -> str:
    algorithm: str = _field(digest, "algorithm", str, where="digest.").lower()
    if algorithm not in ("sha256", "sha512"):
        raise LoadError(f"{METADATA}: digest.algorithm is {algorithm!r}; sha256 and sha512 are known.")
    return algorithm


def _digests(files: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in files.values()):
        raise LoadError(f"{METADATA}: digest.files does not map paths to digests. Rebuild the kernel.")
    return files
