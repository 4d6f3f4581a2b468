"""Integrity of a build: reads its files once, and compares these bytes, which are imported later."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kernels_core import IntegrityError, LoadError

from .metadata import METADATA, SIGNATURE, Metadata


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it."""

    path: str  # relative to the variant
    size: int  # in bytes
    blob: str  # SHA-1 of the git blob; for a large file that of its pointer
    sha256: str | None = None  # SHA-256 of a large file's content; None for others


@dataclass(frozen=True)
class Build:
    """A build in memory."""

    folder: Path  # where it lies
    files: Mapping[str, bytes]  # content per path relative to the folder, without byte code
    metadata: Metadata

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all paths and contents."""
        total = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            # A path has no zero byte, and a hash has one length: no other files make the same bytes.
            total.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
        return total.hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    """Read all files of a build but byte code, which is never used."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not is_byte_code(name)}


def as_build(folder: Path, files: Mapping[str, bytes]) -> Build:
    """Return the build that files make up, with its metadata."""
    if METADATA not in files:
        raise LoadError(f"it has no {METADATA}. Rebuild the kernel with a current kernel builder.")
    return Build(folder, files, Metadata.from_bytes(files[METADATA]))


def is_byte_code(path: str) -> bool:
    """Whether a path is that of compiled Python, which could differ from the source beside it."""
    return path.endswith((".pyc", ".pyo")) or "__pycache__" in path.split("/")


def check_transfer(files: Mapping[str, bytes], listed: Iterable[RemoteFile]) -> str:
    """Compare the files of a build with the list of the Hub for its commit."""
    expected = {file.path: file for file in listed}
    problems = _names(set(expected), set(files), "not on the Hub")
    for path in sorted(expected.keys() & files.keys()):
        file, content = expected[path], files[path]
        if len(content) != file.size:  # first: it says more than two hashes
            problems.append(f"{path} has {len(content)} bytes, not {file.size}")
        elif file.sha256 is not None:
            if hashlib.sha256(content).hexdigest() != file.sha256:
                problems.append(f"{path} has other bytes")
        elif hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:  # the header of git
            problems.append(f"{path} has other bytes")
    if problems:
        raise IntegrityError(f"the files on disk are not those on the Hub: {'; '.join(problems)}")
    return f"{len(expected)} files as listed by the Hub"


def check_digest(build: Build) -> str:
    """Compare a build with the digests in its metadata."""
    digest = build.metadata.digest
    if digest is None:
        return "not checked: the kernel has no digests"
    # The metadata cannot hold a digest of itself, and the signature is made after it.
    files = {path: content for path, content in build.files.items() if path not in (METADATA, SIGNATURE)}
    problems = _names(set(digest.files), set(files), "not in the digest")
    for path in sorted(digest.files.keys() & files.keys()):
        actual = hashlib.new(digest.algorithm, files[path]).digest()
        try:
            promised = base64.b64decode(digest.files[path], validate=True)
        except (binascii.Error, ValueError):
            promised = b""  # no hash is empty, so it differs
        if actual != promised:
            problems.append(f"{path} has other bytes")
    if problems:
        raise IntegrityError(
            f"the files are not those that the digest in {METADATA} promises: {'; '.join(problems)}. "
            "Ask the publisher, and do not use this kernel"
        )
    return f"{len(files)} files, {digest.algorithm}"


def _names(expected: set[str], found: set[str], extra: str) -> list[str]:
    return [f"{path} is missing" for path in sorted(expected - found)] + [
        f"{path} is {extra}" for path in sorted(found - expected)
    ]
