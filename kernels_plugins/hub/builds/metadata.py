"""The metadata of a build: `metadata.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from kernels_core import require_type, set_module

from ..dependency import Dependency, parse_dependency
from ..errors import UnknownError
from ..names import is_commit

METADATA = "metadata.json"
SIGNATURE = "metadata.json.sigstore"

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
_REBUILD = "Rebuild the kernel."


class KernelName(str):
    """The name of a kernel: lower-case letters, digits and dashes.

    Example:
        >>> KernelName("flash-attention").python_name
        'flash_attention'
    """

    __slots__ = ()

    @property
    def python_name(self) -> str:
        """The name as a Python identifier."""
        return self.replace("-", "_")


@dataclass(frozen=True)
class BackendInfo:
    """The backend of a build."""

    backend_type: str  # the kind of backend, such as `cuda`
    # the architectures that it has code for, such as `9.0a` or `gfx942`; None if that is not in the metadata
    archs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Digest:
    """The hashes of a build's files."""

    algorithm: str  # `sha256` or `sha512`
    files: Mapping[str, str]  # base64 of the hash per path relative to the variant


@dataclass(frozen=True)
class GitStatus:
    """The state of a working tree."""

    commit: str  # the commit that was checked out
    dirty: bool  # whether there were changes that were not committed


@dataclass(frozen=True)
class BuilderInfo:
    """The builder of a kernel."""

    version: str  # version of the builder
    git: GitStatus | None = None  # state of its own sources; None if that is not known


@dataclass(frozen=True)
class Provenance:
    """The sources of a build."""

    kernel_builder: BuilderInfo  # the builder
    kernel: GitStatus | None = None  # state of the kernel's sources; None if that is not known

    @property
    def dirty_sources(self) -> tuple[str, ...]:
        """Which sources had changes that were not committed."""
        trees = {"the kernel": self.kernel, "the builder": self.kernel_builder.git}
        return tuple(name for name, git in trees.items() if git is not None and git.dirty)

    @property
    def dirty(self) -> bool:
        """Whether any of them had."""
        return bool(self.dirty_sources)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a build of a kernel.

    Attributes:
        id: Identifies kernel, version and backend.
        name: Name of the kernel.
        version: Number of its version.
        backend: The backend it was built for.
        license: Name of its license.
        upstream: Where the kernel was first published.
        source: Where the sources of this build are.
        python_depends: Python packages that it imports, by their names in metadata.
        kernel_depends: Kernels that it depends on.
        kernels_minver: Level of the kernel interface that it needs.
        digest: Hashes of its files.
        provenance: The sources it was built from.

    Example:
        >>> text = b'{"id": "_x", "name": "x1", "version": 1, "python-depends": [], "backend": {"type": "cpu"}}'
        >>> Metadata.from_bytes(text).backend.backend_type
        'cpu'
    """

    id: str
    name: KernelName
    version: int
    backend: BackendInfo
    license: str | None = None
    upstream: str | None = None
    source: str | None = None
    python_depends: tuple[str, ...] = ()
    kernel_depends: tuple[Dependency, ...] = ()
    kernels_minver: Version | None = None
    digest: Digest | None = None
    provenance: Provenance | None = None

    @classmethod
    def from_bytes(cls, content: bytes) -> Metadata:
        """Read the content of a `metadata.json`.

        Raises:
            LoadError: It is malformed or incomplete; says where. It is a `ValueError`, too.

        Example:
            >>> Metadata.from_bytes(b'{"id": "x"}')
            Traceback (most recent call last):
            ...
            kernels_plugins.hub.errors.UnknownError: metadata.json is incomplete: backend is missing. Rebuild the ...
        """
        require_type(content, (bytes, bytearray, str), "content")
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnknownError(f"{METADATA} cannot be read ({error}). {_REBUILD}") from error
        if not isinstance(data, dict):
            raise UnknownError(f"{METADATA} holds {type(data).__name__}, not an object. {_REBUILD}")
        backend = _field(data, "backend", dict)
        name = _field(data, "name", str)
        if not _NAME.fullmatch(name):
            raise UnknownError(f"{METADATA}: {name!r} is no kernel name ({_NAME.pattern}). Rename the kernel.")
        archs = _field(backend, "backend.archs", list, optional=True)
        return cls(
            id=_field(data, "id", str),
            name=KernelName(name),
            version=_field(data, "version", int),
            backend=BackendInfo(
                _field(backend, "backend.type", str), None if archs is None else _strings(archs, "backend.archs")
            ),
            license=_field(data, "license", str, optional=True),
            upstream=_field(data, "upstream", str, optional=True),
            source=_field(data, "source", str, optional=True),
            python_depends=_strings(_field(data, "python-depends", list), "python-depends"),
            kernel_depends=_kernels(_field(data, "kernel-depends", list, optional=True) or []),
            kernels_minver=_minver(_field(data, "kernels-minver", str, optional=True)),
            digest=_digest(_field(data, "digest", dict, optional=True)),
            provenance=_provenance(_field(data, "provenance", dict, optional=True)),
        )

    @classmethod
    def read_from_file(cls, metadata_path: str | PathLike[str]) -> Metadata:
        """Read a `metadata.json`.

        Raises:
            LoadError: As for `from_bytes`; also if the file cannot be read.
        """
        require_type(metadata_path, (str, PathLike), "metadata_path")
        try:
            content = Path(metadata_path).read_bytes()
        except (OSError, ValueError) as error:  # a null character is no OSError
            raise UnknownError(f"{metadata_path} cannot be read ({error}). Check the path.") from error
        return cls.from_bytes(content)


def _field(data: Mapping[str, Any], place: str, kind: type, *, optional: bool = False) -> Any:
    """Return a value of an object; the place has the names of the objects around it, too."""
    value = data.get(place.rpartition(".")[2])
    if value is None:
        if optional:
            return None
        raise UnknownError(f"{METADATA} is incomplete: {place} is missing. {_REBUILD}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):  # True is an int
        raise UnknownError(f"{METADATA}: {place} is {value!r}, not {kind.__name__}. {_REBUILD}")
    return value


def _strings(values: list[Any], key: str) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise UnknownError(f"{METADATA}: {key} is {values!r}, not a list of names. {_REBUILD}")
    return tuple(values)


def _kernels(entries: list[Any]) -> tuple[Dependency, ...]:
    found: dict[str, Dependency] = {}
    for entry in entries:
        dependency = parse_dependency(entry)
        if isinstance(dependency, str):
            raise UnknownError(
                f"{METADATA}: kernel-depends has {entry!r}: {dependency}. An entry is a repo-id (owner/name) with "
                f"either version (a whole number) or revision. {_REBUILD}"
            )
        if dependency.repo_id in found:
            raise UnknownError(
                f"{METADATA}: kernel-depends names {dependency.repo_id} twice, and get_kernel_dep could not tell the "
                f"two apart. {_REBUILD}"
            )
        found[dependency.repo_id] = dependency
    return tuple(found.values())


def _minver(text: str | None) -> Version | None:
    if text is None:
        return None
    try:
        return Version(text)
    except InvalidVersion as error:
        raise UnknownError(f"{METADATA}: kernels-minver is {text!r}, not a version. {_REBUILD}") from error


def _digest(digest: Mapping[str, Any] | None) -> Digest | None:
    if digest is None:
        return None
    algorithm: str = _field(digest, "digest.algorithm", str).lower()
    if algorithm not in ("sha256", "sha512"):
        raise UnknownError(f"{METADATA}: digest.algorithm is {algorithm!r}; sha256 and sha512 are known.")
    files = _field(digest, "digest.files", dict)
    if not all(isinstance(value, str) for value in files.values()):
        raise UnknownError(f"{METADATA}: digest.files does not map paths to digests. {_REBUILD}")
    return Digest(algorithm, files)


def _provenance(data: Mapping[str, Any] | None) -> Provenance | None:
    if data is None:
        return None
    place = "provenance.kernel-builder"
    builder = _field(data, place, dict)
    kernel = _field(data, "provenance.kernel", dict, optional=True)
    known = builder.get("commit") is not None or builder.get("dirty") is not None
    made_by = BuilderInfo(_field(builder, f"{place}.version", str), _git(builder, place) if known else None)
    return Provenance(made_by, None if kernel is None else _git(kernel, "provenance.kernel"))


def _git(data: Mapping[str, Any], place: str) -> GitStatus:
    commit, dirty = _field(data, f"{place}.commit", str), _field(data, f"{place}.dirty", bool)
    if not is_commit(commit.lower()):  # in either case, as git takes them
        raise UnknownError(f"{METADATA}: {place}.commit is {commit!r}, no commit. {_REBUILD}")
    return GitStatus(commit.lower(), dirty)


set_module("kernels_plugins", globals())
