"""The way of a kernel from its name to a module, step by step.

Each step gives what the next one needs, and none does the work of the next:

* `find(request)`: which commit is it, on what grounds may its code run, and which builds are there. Asks the Hub
  what it must; downloads nothing of the repository. `Found.variants` has the files of *every* build as the Hub
  lists them, so this is what a lock is made from, with `hash_variant` and `read_metadata(found, name)`.
* `locate(request)`: that, and the build that fits this machine. Downloads nothing.
* `fetch(location)`: its files on disk and in memory, checked. Also those of a build for another machine.
* `install(request)`: both, and the build can run here. Nothing of it was run.
* `load(request)`: that, imported.

A locked kernel is asked for with `commit` (it replaces revision and version), `locked` (the hashes of its builds,
compared in `fetch`, before anything is downloaded, and so with the files), and `lock` (where dependencies are looked
up): `locked_request(lock, repo_id)` makes such a request. All steps work offline with what was loaded before, and with
`local_files_only=True` as with `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels_core import IntegrityError, LoadError, ResolutionError

from .cache import COMMIT, Pin, Record
from .errors import AbsentError, UnreachableError
from .importing import import_variant
from .integrity import RemoteFile, Variant, as_variant, check_digest, check_transfer, read_files
from .lock import Lock, LockedKernel, hash_variant
from .metadata import METADATA, Metadata, check_metadata, parse_metadata
from .request import KernelRequest, LockedVariants
from .variants import Machine, choose_variants

__all__ = [
    "Found",
    "Installed",
    "KernelRequest",
    "LoadedKernel",
    "Location",
    "LockedVariants",
    "RepoInfo",
    "fetch",
    "find",
    "install",
    "load",
    "load_folder",
    "locate",
    "locked_request",
    "read_metadata",
]


@dataclass(frozen=True)
class Found:
    """A kernel on the Hub: which commit, and what is there.

    Attributes:
        request: What was asked for.
        pin: The repository that serves it, and the commit.
        variants: The files of each build, as the Hub lists them.
        checked: What was verified, in words: `trust` and `revision`.
    """

    request: KernelRequest
    pin: Pin
    variants: Mapping[str, tuple[RemoteFile, ...]]
    checked: Mapping[str, str]


@dataclass(frozen=True)
class Location:
    """A build of a kernel that fits this machine.

    Attributes:
        variant: Its name, which is that of its folder.
        folder: Where its files lie, or will once they are downloaded.
        found: The kernel on the Hub; None for one on disk.
    """

    variant: str
    folder: Path
    found: Found | None = None

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
    """

    location: Location
    variant: Variant
    checked: Mapping[str, str]


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
    """

    metadata: Metadata
    module: ModuleType
    repo_info: RepoInfo | None = None
    origin: str = ""
    place: str = ""
    checked: Mapping[str, str] | None = None


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
    from . import download  # imports huggingface_hub: only when a repository is really asked for
    from .trust import require_trust

    client = _client(request)
    with _named(str(request)):
        pin, how = _pin(request, client)
        trust = require_trust(request, pin, client)
        notes = download.notes(pin.repo_id)
        record = notes.record(pin.commit) or Record()
        if not record.variants:
            record = Record(record.publisher_trusted, client.list_variants(pin))
            notes.write_record(pin.commit, record)
    return Found(request, pin, record.variants, {"trust": trust, "revision": how})


def locate(request: KernelRequest) -> Location:
    """Find the build of a kernel that fits this machine best.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision and what to do.
    """
    from . import download

    found = find(request)
    with _named(str(request)):
        name = _choose(found.variants, request.backend)
    return Location(name, download.variant_folder(found.pin, name), found)


def install(request: KernelRequest) -> Installed:
    """Have the build that fits on disk and in memory, and check that it is what was promised.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    installed = fetch(locate(request))
    with _named(_where(installed.location)):
        check_metadata(installed.variant.metadata)
    return installed


def fetch(location: Location) -> Installed:
    """Have a build on disk and in memory, whether or not it fits, and check that it is what was promised.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from . import download

    assert location.found is not None
    request, pin = location.found.request, location.found.pin
    with _named(_where(location)):
        lock = _check_lock(request, location.variant, location.found)
        variant, transfer = _fetch(location, _client(request))
        try:
            digest = check_digest(variant)
        except IntegrityError:
            download.discard(variant.folder)
            raise
        notes = download.notes(request.repo_id)
        if request.commit is None:
            notes.write_pin(request.wanted, pin)
        notes.write_pin(pin.commit, pin)
    return Installed(location, variant, {"digest": digest, "transfer": transfer, **location.found.checked, **lock})


def load(request: KernelRequest) -> LoadedKernel:
    """Import a kernel.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    return _load(install(request), str(request))


def load_folder(path: Path, backend: str | None = None) -> LoadedKernel:
    """Import a kernel from a folder on disk.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    return _load(install_folder(path, backend), str(path))


def install_folder(path: Path, backend: str | None = None) -> Installed:
    """Read the build in a folder that fits, and check its digest.

    Raises:
        ResolutionError: One of its kinds, naming folder, variant and what to do.
    """
    with _named(str(path)):
        if not path.is_dir():
            raise AbsentError("there is no such folder: check the path")
        folder = _local_variant(path, backend)
    with _named(f"{path}, variant {folder.name}"):
        variant = as_variant(folder, read_files(folder))
        digest = check_digest(variant)
        check_metadata(variant.metadata)
    return Installed(Location(folder.name, folder), variant, {"digest": digest, "trust": "local files"})


def read_metadata(found: Found, variant: str) -> Metadata:
    """Return what a build says about itself; downloads that file, and nothing else, if it is not there.

    Raises:
        ResolutionError: One of its kinds, naming repository, revision, variant and what to do.
    """
    from . import download

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


_pinning = threading.Lock()
_pins: dict[tuple[str, str], Pin] = {}
"""What the Hub said in this process: the layers of one model come from one commit, whatever is pushed meanwhile."""


def _client(request: KernelRequest) -> Any:
    from .download import Client

    agent = request.user_agent
    assert agent is None or isinstance(agent, str)
    return Client(agent, request.local_files_only)


def _pin(request: KernelRequest, client: Any) -> tuple[Pin, str]:
    """Return the commit of a revision and how it is known; asks the Hub at most once in a process."""
    from . import download

    key = (str(download.cache_folder(request.repo_id, download.REPO_TYPES[0])), request.wanted)
    with _pinning:
        if key not in _pins:
            pin, how = _find_pin(request, client)
            if how != "from the Hub":
                return pin, how
            _pins[key] = pin
        return _pins[key], "from the Hub"


def _find_pin(request: KernelRequest, client: Any) -> tuple[Pin, str]:
    from . import download

    known = download.notes(request.repo_id).pin(request.wanted)
    if known is not None and COMMIT.fullmatch(request.wanted):
        return known, "a commit that is in the cache"
    if client.silence:
        if known is None:
            raise download.not_cached(client.silence)
        return known, f"from the cache: {client.silence} is set"
    try:
        return client.find_pin(request.repo_id, request.wanted), "from the Hub"
    except UnreachableError as error:
        if known is None:
            raise
        return known, f"from the cache: {error}"


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
    assert location.found is not None
    return f"{location.found.request} (commit {location.found.pin.commit[:12]}), variant {location.variant}"


def _fetch(location: Location, client: Any) -> tuple[Variant, str]:
    """Return the files of a variant as listed by the Hub, downloaded if they are not there."""
    from . import download

    assert location.found is not None
    folder, listed = location.folder, location.found.variants[location.variant]
    if not all((folder / file.path).is_file() for file in listed):
        client.fetch_variant(location.found.pin, location.variant, listed)
    try:
        files = read_files(folder)
        transfer = check_transfer(files, listed)
    except IntegrityError as error:
        download.discard(folder)
        raise IntegrityError(f"{error}. They were removed from the cache: try again") from error
    return as_variant(folder, files), transfer


def _load(installed: Installed, where: str) -> LoadedKernel:
    location = installed.location
    pin = location.found.pin if location.found else None
    commit = f" (commit {pin.commit[:12]})" if pin else ""
    place = f"{where}{commit}, variant {location.variant}"
    with _named(place):
        module = import_variant(installed.variant)
    info = RepoInfo(pin.repo_id, pin.commit) if pin else None
    return LoadedKernel(installed.variant.metadata, module, info, location.origin, place, installed.checked)


def _choose(names: Iterable[str], backend: str | None) -> str:
    choice = choose_variants(names, _machine(backend))
    if choice.accepted:
        return str(choice.accepted[0])
    why = "\n".join(f"    {name}: {reason}" for name, reason in choice.rejected) or "    `build` is empty"
    raise AbsentError(
        f"no build variant fits this machine:\n{why}\n  Ask the publisher for a build, or try another one"
    )


def _local_variant(path: Path, backend: str | None) -> Path:
    if (path / METADATA).is_file():
        return path
    base = path / "build" if (path / "build").is_dir() else path
    return base / _choose((folder.name for folder in base.iterdir() if folder.is_dir()), backend)


@cache
def _machine(backend: str | None) -> Machine:
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
