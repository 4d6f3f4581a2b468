"""Locks: the commit of each kernel of a project, and the hash of each of its build variants.

A lock has two files. `kernels.lock` has the form of the library `kernels` 0.17, so that each library reads the files
of the other. That form has no place for hashes, and no unknown keys; so the hashes lie in `kernels.hashes` beside it,
in the form of the `kernels.lock` of `kernels` before 0.17. That older form has both, and is read as a `kernels.lock`,
too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels_core import ArgumentError, ArgumentTypeError

from ...files import write_file
from ..builds.integrity import RemoteFile
from ..dependency import Dependency, parse_dependency
from ..names import is_commit, is_repo_id

LOCK = "kernels.lock"
HASHES = "kernels.hashes"

_HASH_TYPE = "git_lfs_concat"
_HASH = re.compile(r"sha256-[0-9a-f]{64}")
_AGAIN = "Restore the file, or write it anew with `kernels-core lock <project>`."


@dataclass(frozen=True)
class LockedKernel:
    """One kernel in a lock."""

    dependency: Dependency  # the repository, with the version or revision that was requested
    commit: str  # its commit: 40 (or, with SHA-256, 64) hexadecimal digits
    hashes: tuple[tuple[str, str], ...] = ()  # variant and hash, sorted; empty if the lock has none


@dataclass(frozen=True)
class Lock:
    """The locked kernels of a project.

    Example:
        >>> lock = Lock((LockedKernel(Dependency("acme/silu", version=1), "c0ffee" * 6 + "c0de"),))
        >>> parse_lock(format_lock(lock)) == lock
        True
    """

    # first those that the project itself depends on, then those that kernels depend on
    kernels: tuple[LockedKernel, ...]
    origin: str = field(default=LOCK, compare=False)  # where it was read, for messages
    again: str = field(default="lock it anew with `kernels-core lock <project>`", compare=False)  # as is the remedy

    def require(self, repo_id: str) -> LockedKernel:
        """Return the first entry of a repository: there is one version of each that a project depends on."""
        for kernel in self.kernels:
            if kernel.dependency.repo_id == repo_id:
                return kernel
        there = ", ".join(str(kernel.dependency) for kernel in self.kernels) or "nothing"
        raise ArgumentError(
            f'Kernel {repo_id!r} is not locked in {self.origin}, which locks {there}. Write "{repo_id}" = <version> '
            "under [tool.kernels.dependencies] in pyproject.toml, run `kernels-core lock <project>`, and install the "
            "project again."
        )

    def find(self, dependency: Dependency) -> LockedKernel | None:
        """Return the entry of a kernel that another one depends on; None if it is not locked."""
        wanted = (dependency, Dependency(dependency.repo_id))  # the latter in a lock of the older form
        return next((kernel for kernel in self.kernels if kernel.dependency in wanted), None)

    def changes(self, before: Lock) -> list[tuple[LockedKernel | None, LockedKernel | None]]:
        """Return each kernel that differs from an older lock: as it was, and as it is; None where there is none."""
        known = {kernel.dependency: kernel for kernel in before.kernels}
        kept = {kernel.dependency for kernel in self.kernels}
        gone = [kernel for kernel in before.kernels if kernel.dependency not in kept]
        pairs: list[tuple[LockedKernel | None, LockedKernel | None]] = []
        for now in self.kernels:
            was = known.get(now.dependency)
            if was is None:  # another version of a repository takes the place of one that is gone
                was = next((old for old in gone if old.dependency.repo_id == now.dependency.repo_id), None)
                gone = [old for old in gone if old is not was]
            # A lock without hashes, as `kernels` writes it, is not out of date for that.
            if was is None or replace(was, hashes=was.hashes or now.hashes) != now:
                pairs.append((was, now))
        return pairs + [(old, None) for old in sorted(gone, key=lambda kernel: kernel.dependency.order)]


NOTHING = Lock(())
"""The lock of a project that has none yet."""


def hash_variant(files: Iterable[RemoteFile]) -> str:
    """Hash a build variant from the files that the Hub lists for it, as `kernels` before 0.17 did.

    The hash is over the paths in order, each followed by the hash of its content: that of the git blob, or
    the SHA-256 of a large file.

    Example:
        >>> hash_variant([])
        'sha256-e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    total = hashlib.sha256()
    for path, content in sorted((file.path.encode(), bytes.fromhex(file.sha256 or file.blob)) for file in files):
        total.update(path + content)
    return f"sha256-{total.hexdigest()}"


# --- Writing -------------------------------------------------------------------------------------


def format_lock(lock: Lock) -> str:
    """Return the text of `kernels.lock`, as the library `kernels` 0.17 writes it."""
    entries = []
    for kernel in lock.kernels:
        wanted = kernel.dependency
        if wanted.wanted is None:
            raise ArgumentError(f"{wanted.repo_id} has no version in {lock.origin}: run `kernels-core lock <project>`.")
        pin = {"revision": wanted.revision} if wanted.version is None else {"version": wanted.version}
        entries.append({"dependency": {"repo-id": wanted.repo_id, **pin}, "lock": {"commit": kernel.commit}})
    return json.dumps(entries, indent=2, ensure_ascii=False)


def format_hashes(lock: Lock) -> str:
    """Return the text of `kernels.hashes`: the commit and the hash of each variant, per kernel."""
    found = {(kernel.dependency.repo_id, kernel.commit): kernel.hashes for kernel in lock.kernels}
    entries = [
        {
            "repo_id": repo_id,
            "sha": commit,
            "variants": {variant: {"hash": value, "hash_type": _HASH_TYPE} for variant, value in hashes},
        }
        for (repo_id, commit), hashes in sorted(found.items())
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False)


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock and its hashes, each whole or not at all."""
    lines = format_lock(lock)
    # The hashes first: if only they are written, they do not belong to the old lock, and reading it says so.
    for place, text in ((hashes_of(path), format_hashes(lock)), (path, lines)):
        try:
            write_file(place.resolve(), text)
        except OSError as error:
            raise ArgumentError(f"Cannot write {place}: {error}. Check the folder and its permissions.") from error


# --- Reading -------------------------------------------------------------------------------------


def hashes_of(path: Path) -> Path:
    """Return where the hashes of a lock lie: `kernels.hashes` for `kernels.lock`."""
    return path.with_suffix(".hashes")


def read_lock(path: str | Path) -> Lock:
    """Read a lock, and its hashes if they lie beside it."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"lockfile is the path of a {LOCK}, not {path!r}.")
    path = Path(path)
    if os.path.isdir(path):  # that of the path raises where its name is too long
        raise ArgumentError(f"lockfile is {str(path)!r}, a folder: name the file in it, {str(path / LOCK)!r}.")
    text = _read(path)
    if text is None:
        raise ArgumentError(
            f"There is no lock {str(path)!r}: run `kernels-core lock {path.parent}`, or check the path."
        )
    return parse_lock(text, _read(hashes_of(path)), origin=str(path))


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a wrong encoding, or no path
        raise ArgumentError(f"Cannot read {path}: {error}. {_AGAIN}") from error


def parse_lock(text: str, hashes: str | None = None, *, origin: str = LOCK) -> Lock:
    """Read the text of a lock, in the form of `kernels` 0.17 or in the older one.

    Example:
        >>> parse_lock('[{"dependency": {"repo-id": "acme/silu"}, "lock": {}}]')
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: kernels.lock, entry 1: dependency: it has neither version nor revision...
    """
    kernels: dict[Dependency, LockedKernel] = {}
    for place, entry in _entries(text, origin):
        kernel = _older(entry, place) if "repo_id" in entry else _entry(entry, place)
        if kernel.dependency in kernels:
            raise _malformed(place, f"{kernel.dependency} is locked twice")
        kernels[kernel.dependency] = kernel
    if hashes is not None:
        beside = f"{HASHES} beside {origin}"
        older = [_older(entry, place) for place, entry in _entries(hashes, beside)]
        known = {(kernel.dependency.repo_id, kernel.commit): kernel.hashes for kernel in older}
        for dependency, kernel in kernels.items():
            if (dependency.repo_id, kernel.commit) not in known:
                raise ArgumentError(
                    f"{beside} is of another lock: it has no {dependency.repo_id} at {kernel.commit[:12]}. Write both "
                    "anew with `kernels-core lock <project>`, or delete it to do without hashes."
                )
            kernels[dependency] = replace(kernel, hashes=known[dependency.repo_id, kernel.commit])
    return Lock(tuple(kernels.values()), origin)


def _entries(text: str, origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each entry with the name of its place."""
    try:
        # Some editors put this mark at the start of a file.
        data = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object)
        text.encode()  # JSON may have half of a surrogate pair, which no file can
    except (ValueError, RecursionError) as error:
        raise _malformed(origin, f"it is no JSON ({error})") from error
    if not isinstance(data, list):
        raise _malformed(origin, f"it holds {type(data).__name__}, not a list")
    for number, entry in enumerate(data, 1):
        place = f"{origin}, entry {number}"
        if not isinstance(entry, dict):
            raise _malformed(place, f"{entry!r} is no object")
        yield place, entry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # Python keeps the last value of a key, other readers of the file may keep the first
        raise ValueError(f"a key is repeated among {', '.join(key for key, _ in pairs)}")
    return found


def _entry(entry: Mapping[str, Any], place: str) -> LockedKernel:
    """Read an entry as `kernels` 0.17 writes it."""
    wanted, lock = _fields(entry, place, "dependency", "lock")
    dependency = parse_dependency(wanted)
    if isinstance(dependency, str):
        raise _malformed(f"{place}: dependency", dependency)
    _only(lock, f"{place}: lock", {"commit"})
    return LockedKernel(dependency, _commit(lock.get("commit"), f"{place}: commit"))


def _older(entry: Mapping[str, Any], place: str) -> LockedKernel:
    """Read an entry as `kernels` before 0.17 wrote it, and as we write hashes."""
    if "files" in entry:
        raise _malformed(place, "it is of a form that neither library reads any more")
    _only(entry, place, {"repo_id", "sha", "variants"})
    (variants,) = _fields({"variants": entry.get("variants")}, place, "variants")
    hashes = {}
    for variant, value in variants.items():
        where = f"{place}: {variant}"
        if not isinstance(value, dict) or not {"hash"} <= value.keys() <= {"hash", "hash_type"}:
            raise _malformed(where, f"{value!r} is not hash and hash_type")
        if value.get("hash_type", _HASH_TYPE) != _HASH_TYPE:
            raise _malformed(where, f"hash_type is {value['hash_type']!r}, and {_HASH_TYPE!r} is known")
        if not isinstance(value["hash"], str) or not _HASH.fullmatch(value["hash"]):
            raise _malformed(where, f"hash is {value['hash']!r}, not sha256- and 64 hexadecimal digits")
        if not variant.isprintable() or not variant:
            raise _malformed(where, f"{variant!r} is no name of a variant")
        hashes[variant] = value["hash"]
    repo_id = entry.get("repo_id")
    if not is_repo_id(repo_id):
        raise _malformed(f"{place}: repo_id", f"{repo_id!r} is not 'owner/name'")
    return LockedKernel(Dependency(repo_id), _commit(entry.get("sha"), f"{place}: sha"), tuple(sorted(hashes.items())))


def _fields(entry: Mapping[str, Any], place: str, *names: str) -> list[Mapping[str, Any]]:
    _only(entry, place, set(names))
    for name in names:
        if not isinstance(entry.get(name), dict):
            raise _malformed(place, f"{name} is {entry[name]!r}, not an object" if name in entry else f"no {name}")
    return [entry[name] for name in names]


def _only(entry: Mapping[str, Any], place: str, known: set[str]) -> None:
    if unknown := sorted(entry.keys() - known):
        raise _malformed(place, f"{', '.join(map(repr, unknown))} is not known, {', '.join(sorted(known))} are")


def _commit(value: object, place: str) -> str:
    commit = value.lower() if isinstance(value, str) else value
    if not is_commit(commit):
        raise _malformed(place, f"{value!r} is not a commit of 40 or 64 hexadecimal digits")
    return commit


def _malformed(place: str, problem: str) -> ArgumentError:
    return ArgumentError(f"{place}: {problem}. {_AGAIN}")
