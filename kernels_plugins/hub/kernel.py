"""Kernels that were imported in this process."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels_core import set_module

from ..locks import KeyedLocks
from .builds.importing import import_build
from .builds.machine import this_machine
from .builds.metadata import Metadata
from .builds.requirements import check_device, check_requirements, warn_dirty
from .builds.variants import parse_variant
from .dependency import Dependency
from .fetching import FetchedBuild, install, install_folder, naming
from .locking.lockfile import Lock, LockedKernel, hash_variant
from .request import KernelRequest, RepoInfo, RequestOptions

_guard = KeyedLocks()
_loaded: dict[tuple[str, str], LoadedKernel] = {}


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that was imported in this process.

    Attributes:
        metadata: The metadata of its build.
        module: The module.
        repo_info: The repository and commit; None for one on disk.
        origin: One line that names it.
        place: The request and the build, for messages.
        checked: The checks that were passed, in words.
        dependencies: The kernels that it depends on.
        content: A hash of its files, and of those of the kernels that it depends on.
        lock: The commits and hashes of it and of these; None for a folder on disk.
    """

    metadata: Metadata
    module: ModuleType
    repo_info: RepoInfo | None = None
    origin: str = ""
    place: str = ""
    checked: Mapping[str, str] = field(default_factory=dict)
    dependencies: tuple[LoadedKernel, ...] = ()
    content: str = field(default="", repr=False)
    lock: Lock | None = field(default=None, repr=False)

    @property
    def provenance(self) -> dict[str, Any]:
        """Who published it, under which license, with which digests; the same of all that it depends on."""
        metadata, repository, digest = self.metadata, self.repo_info, self.metadata.digest
        algorithm, files = (digest.algorithm, digest.files) if digest else ("", {})
        return {
            "name": metadata.name,
            "version": str(metadata.version),
            "repository": repository.repo_id if repository else "",
            "commit": repository.revision if repository else "",
            "content": self.content,
            "publisher": repository.repo_id.partition("/")[0] if repository else "",
            "license": metadata.license or "",
            "upstream": metadata.upstream or "",
            "trust": self.checked.get("trust", ""),
            "signature": self.checked.get("signature", "none"),
            "digests": {path: f"{algorithm}:{b64decode(text).hex()}" for path, text in files.items()},
            "dependencies": [dependency.provenance for dependency in self.dependencies],
        }


def load(request: KernelRequest) -> LoadedKernel:
    """Import a kernel, after all that it depends on."""
    return _load(install(request), request)


def load_folder(path: Path, options: RequestOptions) -> LoadedKernel:
    """Import a kernel from a folder on disk, after all that it depends on."""
    return _load(install_folder(path, options), options)


def get_loaded_kernels() -> list[LoadedKernel]:
    """Return every kernel that was imported in this process, oldest first, each build once.

    Example:
        >>> silu = get_kernel("acme/silu", version=1)
        >>> any(kernel.module is silu for kernel in get_loaded_kernels())
        True
    """
    with _guard.hold():
        return list(_loaded.values())


def _load(fetched: FetchedBuild, options: RequestOptions) -> LoadedKernel:
    # All are checked before one is imported: a kernel that is refused leaves no import behind.
    for one in _each(fetched):
        with naming(one.selected.place):
            metadata = one.build.metadata
            variant = parse_variant(one.selected.variant)
            on_host = variant is None or variant.backend in ("cpu", "universal")
            used = "cpu" if options.on_cpu and options.backend is None and on_host else options.backend
            check_requirements(metadata, (this_machine(used).backend,))
            if options.check_arch:
                check_device(metadata)
            warn_dirty(metadata, one.selected.origin)
    return _import(fetched)


def _each(fetched: FetchedBuild) -> Iterator[FetchedBuild]:
    """Yield a kernel and all that it depends on, dependencies first."""
    for dependency in fetched.dependencies.values():
        yield from _each(dependency)
    yield fetched


def _import(fetched: FetchedBuild) -> LoadedKernel:
    # First: a kernel asks for them at the top of its module.
    needed = {repo_id: _import(dependency) for repo_id, dependency in fetched.dependencies.items()}
    selected = fetched.selected
    with naming(selected.place):
        module = import_build(fetched.build, {repo_id: kernel.module for repo_id, kernel in needed.items()})
    pin = selected.resolved.pin if selected.resolved else None
    kernel = LoadedKernel(
        fetched.build.metadata,
        module,
        RepoInfo(pin.repo_id, pin.commit) if pin else None,
        selected.origin,
        selected.place,
        fetched.checked,
        tuple(needed.values()),
        _content(fetched, needed.values()),
        _lock(fetched, needed.values()),
    )
    with _guard.hold():
        # One build may have two origins, as through a redirect: each is listed.
        _loaded[module.__name__, selected.origin] = kernel
    return kernel


def _content(fetched: FetchedBuild, needed: Iterable[LoadedKernel]) -> str:
    own, inner = fetched.build.fingerprint, sorted(kernel.content for kernel in needed)
    return hashlib.sha256("".join((own, *inner)).encode()).hexdigest() if inner else own


def _lock(fetched: FetchedBuild, needed: Iterable[LoadedKernel]) -> Lock | None:
    """Return the commit and the hash of a kernel, and of all that it depends on; None for a folder on disk."""
    resolved, variant = fetched.selected.resolved, fetched.selected.variant
    if resolved is None:
        return None
    request, pin = resolved.request, resolved.pin
    revision = request.revision or pin.commit if request.version is None else None
    wanted = Dependency(pin.repo_id, request.version, revision)
    own = LockedKernel(wanted, pin.commit, ((variant, hash_variant(resolved.variants[variant])),))
    inner = (kernel for one in needed if one.lock is not None for kernel in one.lock.kernels)
    return Lock((own, *dict.fromkeys(kernel for kernel in inner if kernel.dependency != wanted)))


set_module("kernels_plugins", globals())
