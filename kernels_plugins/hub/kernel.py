"""The way of a kernel from its name to a module, step by step.

Each step gives what the next one needs, and none does the work of the next:

* `find(request)`: which commit is it, on what grounds may its code run, and which builds are there. Asks the Hub
  what it must; downloads nothing of the repository. `Found.variants` has the files of *every* build as the Hub
  lists them, so this is what a lock is made from, with `hash_variant` and `read_metadata(found, name)`.
* `locate(request)`: that, and the build that fits this machine. Downloads nothing.
* `fetch(location)`: its files on disk and in memory, checked. Also those of a build for another machine.
* `install(request)`: both, and the same for all that it depends on. Nothing of it was run.
* `load(request)`: that, imported, if it can run here.

A locked kernel is asked for with `commit` (it replaces revision and version), `locked` (the hashes of its builds,
compared in `fetch`, before anything is downloaded, and so with the files), and `lock` (where dependencies are looked
up): `locked_request(lock, repo_id)` makes such a request. All steps work offline with what was loaded before, and with
`local_files_only=True` as with `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels_core import IntegrityError, LoadError, ResolutionError

from .builds.importing import import_variant
from .builds.integrity import RemoteFile, Variant, as_variant, check_digest, check_transfer, read_files
from .builds.metadata import METADATA, Metadata, parse_metadata
from .builds.requirements import check_device, check_requirements, warn_dirty
from .builds.variants import Choice, Machine, choose_for_cpu, choose_variants, parse_variant
from .client.cache import Pin
from .client.overrides import VARIABLE, find_override
from .errors import AbsentError, UnknownError
from .locking.lockfile import Lock, LockedKernel, hash_variant
from .request import KernelRequest, LockedVariants, Terms

__all__ = [
    "Found",
    "Installed",
    "KernelRequest",
    "LoadedKernel",
    "Location",
    "LockedVariants",
    "RepoInfo",
    "Terms",
    "choose",
    "fetch",
    "find",
    "install",
    "install_folder",
    "load",
    "load_folder",
    "loaded_kernels",
    "local_builds",
    "local_variant",
    "locate",
    "locked_request",
    "machine",
    "read_metadata",
]


@dataclass(frozen=True)
class Found:
    """A kernel on the Hub: which commit, and what is there.

    Attributes:
        request: What was asked for.
        pin: The repository that serves it, and the commit.
        variants: The files of each build, as the Hub lists them.
        checked: What was verified, in words: `trust` and `revision`; `redirect`, if it was redirected.
        first: The commit before redirects, of the repository that was asked for.
    """

    request: KernelRequest
    pin: Pin
    variants: Mapping[str, tuple[RemoteFile, ...]]
    checked: Mapping[str, str]
    first: Pin | None = None


@dataclass(frozen=True)
class Location:
    """A build of a kernel that fits this machine.

    Attributes:
        variant: Its name, which is that of its folder.
        folder: Where its files lie, or will once they are downloaded.
        found: The kernel on the Hub; None for one on disk.
        asked: What was asked for, for messages about one on disk.
    """

    variant: str
    folder: Path
    found: Found | None = None
    asked: str = ""

    @property
    def origin(self) -> str:
        """One line that names it."""
        return f"{self.found.pin} ({self.variant})" if self.found else str(self.folder)


@dataclass(frozen=True)
class Installed:
    """A build whose files are here and are what was promised.

    Attributes:
        location: Which build.
        variant: Its files and metadata, in memory.
        checked: What was verified, in words.
        dependencies: The kernels that it depends on, by repository.
    """

    location: Location
    variant: Variant
    checked: Mapping[str, str]
    dependencies: Mapping[str, Installed] = field(default_factory=dict)


@dataclass(frozen=True)
class RepoInfo:
    """Where a kernel is from.

    Attributes:
        repo_id: The repository that served it.
        revision: Its commit.
    """

    repo_id: str
    revision: str


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that was imported in this process.

    Attributes:
        metadata: What it says about itself.
        module: What was imported.
        repo_info: Where it is from; None for one on disk.
        origin: One line that names it.
        place: What was asked for and found, for messages.
        checked: What was verified, in words.
        dependencies: The kernels that it depends on.
    """

    metadata: Metadata
    module: ModuleType
    repo_info: RepoInfo | None = None
    origin: str = ""
    place: str = ""
    checked: Mapping[str, str] = field(default_factory=dict)
    dependencies: tuple[LoadedKernel, ...] = ()


def locked_request(lock: Lock, locked: LockedKernel | str, **options: Any) -> KernelRequest:
    """Ask for what a lock says, and the same for its dependencies.

    Args:
        lock: The lock.
        locked: One of its kernels, or the name of a repository.
        options: As for `KernelRequest`.

    Raises:
        ArgumentError: If it is not locked.
    """
    if isinstance(locked, str):
        locked = lock.require(locked)
    wanted = locked.dependency
    return KernelRequest(
        wanted.repo_id,
        revision=wanted.revision,
        version=wanted.version,
        commit=locked.commit,
        locked=locked.hashes,
        lock=lock,
        **options,
    )


# --- The steps -----------------------------------------------------------------------------------


def find(request: KernelRequest) -> Found:
    """Find out which commit a kernel is, whether its code may run, and which builds there are.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision and what to do.
    """
    from .client import revision  # imports huggingface_hub: only when a repository is really asked for
    from .client.trust import require_trust

    client = _client(request)
    with _named(str(request)):
        pinned = revision.find_revision(request, client)
        pin = pinned.pin
        checked = {"trust": require_trust(request, pin, client), "revision": pinned.how}
        if pinned.redirect:
            checked["redirect"] = pinned.redirect
        variants = revision.find_record(pin, client).variants
        if not variants:
            raise AbsentError("it has no folder `build`, so it is no kernel repository (or was never built)")
        revision.look_for_newer(request, pin, client)
        revision.tell_newer(request)
    return Found(request, pin, variants, checked, pinned.first)


def locate(request: KernelRequest, *, suggest: bool = True) -> Location:
    """Find the build of a kernel that fits this machine best.

    Args:
        request: What is asked for.
        suggest: Whether to look for a version that fits, where this one does not.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision and what to do.
    """
    from .client import download

    found = find(request)
    with _named(str(request)):
        try:
            name = choose(found.variants, request.terms)
        except AbsentError as error:
            if not suggest or request.commit is not None:
                raise
            raise AbsentError(f"{error}{_suggestion(found)}") from error
    return Location(name, download.variant_folder(found.pin, name), found)


def fetch(location: Location) -> Installed:
    """Have a build on disk and in memory, whether or not it fits, and check that it is what was promised.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from .client import download

    found = location.found
    assert found is not None
    request, pin, first = found.request, found.pin, found.first or found.pin
    with _named(_where(location)), _alone(location.folder):
        lock = _check_lock(request, location.variant, found)
        variant, transfer = _fetch(location, _client(request))
        try:
            digest = check_digest(variant)
        except IntegrityError:
            download.discard(variant.folder)
            raise
        notes = download.notes(request.repo_id)
        if request.commit is None:
            notes.write_pin(request.wanted, pin)
        notes.write_pin(first.commit, pin)
        if pin.repo_id != request.repo_id:
            download.notes(pin.repo_id).write_pin(pin.commit, pin)
    return Installed(location, variant, {"digest": digest, "transfer": transfer, **found.checked, **lock})


def install(request: KernelRequest) -> Installed:
    """Have the build that fits, and all that it depends on, on disk and in memory, and check that it was promised.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    return _install(request, (), {})


def install_folder(path: Path, terms: Terms | None = None) -> Installed:
    """Read the build in a folder that fits, check its digest, and install all that it depends on.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    terms = terms or Terms()
    return _with_dependencies(_read_folder(path, terms), terms, (), {})


def load(request: KernelRequest) -> LoadedKernel:
    """Import a kernel, after all that it depends on.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    return _load(install(request), request.terms)


def load_folder(path: Path, terms: Terms | None = None) -> LoadedKernel:
    """Import a kernel from a folder on disk, after all that it depends on.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    terms = terms or Terms()
    return _load(install_folder(path, terms), terms)


def loaded_kernels() -> list[LoadedKernel]:
    """Return what was imported in this process, oldest first."""
    with _holding:
        return list(_loaded.values())


def read_metadata(found: Found, variant: str) -> Metadata:
    """Return what a build says about itself; downloads that file, and nothing else, if it is not there.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from .client import download

    with _named(f"{found.request} (commit {found.pin.commit[:12]}), variant {variant}"):
        listed = {file.path: file for file in found.variants[variant]}
        if METADATA not in listed:
            raise LoadError(f"it has no {METADATA}. Rebuild the kernel with a current kernel builder.")
        path = download.variant_folder(found.pin, variant) / METADATA
        if not path.is_file():
            path = _client(found.request).fetch_file(found.pin, f"build/{variant}/{METADATA}")
        content = path.read_bytes()
        try:
            check_transfer({METADATA: content}, [listed[METADATA]])
        except IntegrityError as error:
            download.discard(path)
            raise IntegrityError(f"{error}. They were removed from the cache: try again") from error
        return parse_metadata(content)


# --- Inside --------------------------------------------------------------------------------------


_holding = threading.Lock()
_loaded: dict[tuple[str, str], LoadedKernel] = {}
_busy: dict[Path, threading.Lock] = {}

_MOST_VERSIONS = 5  # that are looked at for one that fits


def _suggestion(found: Found) -> str:
    """Name the newest version that has a build for this machine, if there is one, as far as the Hub tells."""
    client, asked = _client(found.request), found.request.version
    if client.silence:
        return ""
    try:
        versions = client.list_versions(found.pin.repo_id, found.pin.repo_type)
        for version in sorted(versions.keys() - {asked}, reverse=True)[:_MOST_VERSIONS]:
            names, _ = client.list_files(replace(found.pin, commit=versions[version]))
            if _fitting(names, found.request.terms).accepted:
                return f". Version {version} has one that fits: version={version}"
    except LoadError as error:  # the question was another one: answer that, and say what is not known
        return f". Whether another version has one could not be asked: {error}"
    return ""


def _client(request: KernelRequest) -> Any:
    from .client.agent import describe
    from .client.download import Client

    agent = request.user_agent
    assert agent is None or isinstance(agent, str)
    return Client(describe(agent), request.local_files_only)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one thread at a time see to the files of a build."""
    with _holding:
        lock = _busy.setdefault(folder, threading.Lock())
    with lock:
        yield


def _install(request: KernelRequest, path: tuple[str, ...], memo: dict[KernelRequest, Installed]) -> Installed:
    """Install a kernel that was reached on a path of kernels, each of which depends on the next."""
    name = str(request)
    if name in path:
        circle = " -> ".join((*path[path.index(name) :], name))
        raise UnknownError(f"kernels depend on each other in a circle: {circle}. Tell their publishers")
    if request not in memo:
        folder = None if request.lock or request.commit else find_override(request.repo_id)
        if folder is None:
            own = fetch(locate(request))
        else:
            own = _read_folder(folder, request.terms, f"{request.repo_id} ({VARIABLE})", f"local files: {VARIABLE}")
        memo[request] = _with_dependencies(own, request.terms, (*path, name), memo)
    return memo[request]


def _with_dependencies(
    own: Installed, terms: Terms, path: tuple[str, ...], memo: dict[KernelRequest, Installed]
) -> Installed:
    with _named(_where(own.location)):
        wanted = own.variant.metadata.kernel_depends
        dependencies = {one.repo_id: _install(terms.ask(one), path, memo) for one in wanted}
    return replace(own, dependencies=dependencies)


def _read_folder(path: Path, terms: Terms, asked: str = "", trust: str = "local files") -> Installed:
    with _named(f"{asked}: {path}" if asked else str(path)):
        if not path.is_dir():
            raise AbsentError("there is no such folder: check the path")
        folder = local_variant(path, terms)
    location = Location(folder.name, folder, asked=f"{asked}: {path}" if asked else str(path))
    with _named(_where(location)):
        variant = as_variant(folder, read_files(folder))
        digest = check_digest(variant)
    return Installed(location, variant, {"digest": digest, "trust": trust})


def _load(installed: Installed, terms: Terms) -> LoadedKernel:
    for one in _each(installed):
        with _named(_where(one.location)):
            metadata = one.variant.metadata
            check_requirements(metadata, (_backend(one.location.variant, terms),))
            if terms.check_arch:
                check_device(metadata)
            warn_dirty(metadata, one.location.origin)
    return _import(installed)


def _backend(name: str, terms: Terms) -> str:
    """Return the kind of backend that a build is used with."""
    variant = parse_variant(name)
    host = terms.on_cpu and terms.backend is None and (variant is None or variant.backend in ("cpu", "universal"))
    return machine("cpu" if host else terms.backend).backend


def _each(installed: Installed) -> Iterator[Installed]:
    """Yield a kernel and all that it depends on, dependencies first."""
    for dependency in installed.dependencies.values():
        yield from _each(dependency)
    yield installed


def _import(installed: Installed) -> LoadedKernel:
    needed = {repo_id: _import(dependency) for repo_id, dependency in installed.dependencies.items()}
    location = installed.location
    with _named(_where(location)):
        module = import_variant(installed.variant, {repo_id: kernel.module for repo_id, kernel in needed.items()})
    pin = location.found.pin if location.found else None
    kernel = LoadedKernel(
        installed.variant.metadata,
        module,
        RepoInfo(pin.repo_id, pin.commit) if pin else None,
        location.origin,
        _where(location),
        installed.checked,
        tuple(needed.values()),
    )
    with _holding:
        _loaded[module.__name__, location.origin] = kernel
    return kernel


def _check_lock(request: KernelRequest, name: str, found: Found) -> dict[str, str]:
    """Refuse a build that a lock does not know, or knows with other files; else say what was checked."""
    if request.lock is None:
        return {}
    where = request.lock.origin
    if not request.locked:
        return {"lock": f"the commit is that in {where}; its files are not checked: the lock has no hashes"}
    promised = dict(request.locked)
    if name not in promised:
        raise IntegrityError(f"{where} knows no variant {name}. Lock it anew with `kernels-core lock <project>`")
    actual = hash_variant(found.variants[name])
    if actual != promised[name]:
        raise IntegrityError(
            f"its variant {name} is not the one that was locked: {where} says {promised[name]}, and it is {actual}. Do "
            "not use this kernel; if the publisher can explain it, lock it anew with `kernels-core lock <project>`"
        )
    return {"lock": f"commit and files are those in {where}"}


def _where(location: Location) -> str:
    if location.found is None:
        return f"{location.asked}, variant {location.variant}"
    return f"{location.found.request} (commit {location.found.pin.commit[:12]}), variant {location.variant}"


def _fetch(location: Location, client: Any) -> tuple[Variant, str]:
    """Return the files of a variant as listed by the Hub, downloaded if they are not there."""
    from .client import download

    assert location.found is not None
    folder, listed = location.folder, location.found.variants[location.variant]
    here = {file.path for file in listed if (folder / file.path).is_file()}
    # Of a locked build that was never downloaded, the metadata may be here; of one that was, nothing may be missing.
    locked = location.found.request.commit is not None
    if len(here) < len(listed) and not (locked and client.silence and here - {METADATA}):
        client.fetch_variant(location.found.pin, location.variant, listed)
    try:
        files = read_files(folder)
        transfer = check_transfer(files, listed)
    except IntegrityError as error:
        download.discard(folder)
        raise IntegrityError(f"{error}. They were removed from the cache: try again") from error
    return as_variant(folder, files), transfer


def choose(names: Iterable[str], terms: Terms | None = None) -> str:
    """Return the name of the build that fits this machine best.

    Raises:
        LoadError: If none fits; says why each does not. It is a `FileNotFoundError`, too.
    """
    choice = _fitting(names, terms or Terms())
    if choice.accepted:
        return str(choice.accepted[0])
    why = "\n".join(f"    {name}: {reason}" for name, reason in choice.rejected) or "    `build` is empty"
    raise AbsentError(
        f"no build variant fits this machine:\n{why}\n  Ask the publisher for a build, or try another one"
    )


def _fitting(names: Iterable[str], terms: Terms) -> Choice:
    if terms.on_cpu and terms.backend is None:
        return choose_for_cpu(names, machine())
    return choose_variants(names, machine(terms.backend))


def local_variant(path: Path, terms: Terms | None = None) -> Path:
    """Return the folder of the build that fits best: of a repository, of a folder with builds, or of a build.

    Raises:
        LoadError: If none fits; says why each does not.
    """
    if (path / METADATA).is_file():
        return path
    builds = {folder.name: folder for folder in local_builds(path)}
    return builds[choose(builds, terms)]


def local_builds(path: Path) -> list[Path]:
    """Return the folders of the builds of a repository on disk, or in a folder with builds."""
    base = path / "build" if (path / "build").is_dir() else path
    return sorted(folder for folder in base.iterdir() if folder.is_dir())


@cache
def machine(backend: str | None = None) -> Machine:
    """Return what decides which builds fit.

    Raises:
        ArgumentError: If torch was not built for that backend.
    """
    return Machine.here(backend)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of what is being loaded before the message of an error."""
    try:
        yield
    except ResolutionError as error:
        raise type(error)(f"{where}: {error}") from error
    except OSError as error:
        raise LoadError(f"{where}: {type(error).__name__}: {error}. Check the disk and its permissions") from error
