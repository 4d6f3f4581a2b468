"""Metadata of repositories, kept beside the files in the client's cache.

For each repository: the commit of each revision, whether the publisher was trusted, and the files that the Hub listed
for a commit. With these, a kernel that was loaded once loads again without a request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ...files import write_file
from ...locks import KeyedLocks
from ..builds.integrity import RemoteFile
from ..names import is_commit, is_repo_id, is_revision


@dataclass(frozen=True)
class Pin:
    """A repository at one commit."""

    repo_id: str  # the repository that serves it, after redirects
    repo_type: str  # `kernel`, or `model` for the older form
    commit: str  # 40 hexadecimal digits

    @classmethod
    def parse(cls, data: Any) -> Pin | None:
        """Read a pin as JSON has it; None where it is malformed."""
        known: Mapping[str, Any] = data if isinstance(data, dict) else {}
        repo_id, repo_type, commit = map(known.get, ("repo_id", "repo_type", "commit"))
        if is_repo_id(repo_id) and repo_type in ("kernel", "model") and is_commit(commit):
            return cls(repo_id, repo_type, commit)
        return None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"


@dataclass(frozen=True)
class Record:
    """The metadata of a commit."""

    publisher_trusted: bool = False  # whether the Hub listed the publisher as trusted when this was downloaded
    # the files of each build variant, as the Hub lists them
    variants: Mapping[str, tuple[RemoteFile, ...]] = field(default_factory=dict)
    # repository and revision that it redirects to; empty if it is not redirected, None if that is not known yet
    redirect: tuple[()] | tuple[str, str] | None = None

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Record | None:
        """Read metadata as JSON has them; None where they are malformed."""
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            variants = {name: tuple(RemoteFile(**file) for file in files) for name, files in data["variants"].items()}
            if all(_is_well_formed(file) for files in variants.values() for file in files):
                return cls(data["publisher_trusted"] is True, variants, _redirect(data.get("redirect")))
        return None


_changing = KeyedLocks()


class MetadataCache:
    """The metadata of one repository, in files of its folder in the cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "kernels-core"

    def pin(self, revision: str) -> Pin | None:
        """Return the pin of a revision when it was last loaded."""
        return Pin.parse(self._read(self._revision(revision)))

    def pins(self) -> dict[str, Pin]:
        """Return the pin of each revision that was loaded, by the name under which it is kept."""
        names = [unquote(path.stem) for path in sorted(self._revision("").parent.glob("*.json"))]
        return {name: pin for name in names if (pin := self.pin(name)) is not None}

    def write_pin(self, revision: str, pin: Pin) -> None:
        """Remember the pin of a revision."""
        self._write(self._revision(revision), asdict(pin))

    def record(self, commit: str) -> Record | None:
        """Return the metadata of a commit."""
        return Record.parse(self._read(self._commit(commit)))

    def update_record(self, commit: str, **changes: Any) -> None:
        """Change the metadata of a commit, and keep the rest of it, which another thread may change meanwhile."""
        with _changing.hold(self._folder):
            self._write(self._commit(commit), asdict(replace(self.record(commit) or Record(), **changes)))

    def newest(self) -> int | None:
        """Return the newest version, when the Hub was last asked for versions."""
        newest = self._read(self._folder / "versions.json").get("newest")
        return newest if type(newest) is int else None

    def write_newest(self, version: int) -> None:
        """Remember the newest version."""
        self._write(self._folder / "versions.json", {"newest": version})

    def note(self, question: str) -> dict[str, Any]:
        """Return the note on a question that some process asked last; empty if there is none."""
        return self._read(self._note(question, "json"))

    def write_note(self, question: str, note: Mapping[str, Any]) -> None:
        """Write a note; an empty one is none."""
        self._write(self._note(question, "json"), dict(note))

    def lock(self, question: str) -> Path:
        """Return the file that the process holds which asks a question: whoever finds it shares this cache."""
        return self._note(question, "lock")

    def _note(self, question: str, kind: str) -> Path:
        # Hashed: a branch in it may be longer than the name of a file.
        return self._folder / "answers" / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.{kind}"

    def _revision(self, revision: str) -> Path:
        return self._folder / "revisions" / f"{quote(revision, safe='')}.json"  # a branch may have slashes in its name

    def _commit(self, commit: str) -> Path:
        return self._folder / "commits" / f"{commit}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a file; one that cannot be read or is malformed is empty, and is written anew."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            data = json.loads(path.read_text()) if path.is_file() else None  # a pipe would be read for ever
            return data if isinstance(data, dict) else {}
        return {}

    def _write(self, path: Path, data: dict[str, Any]) -> None:
        """Write a file, where that is possible: a read-only cache costs one more request."""
        with contextlib.suppress(OSError):
            # As it would be read: tuples are lists then.
            if self._read(path) != json.loads(json.dumps(data)):
                write_file(path, json.dumps(data))


def _is_well_formed(file: RemoteFile) -> bool:
    texts = (file.path, file.blob, "" if file.sha256 is None else file.sha256)
    return type(file.size) is int and all(isinstance(text, str) for text in texts)  # a bool is an int


def _redirect(data: Any) -> tuple[()] | tuple[str, str] | None:
    if data == []:
        return ()
    known = isinstance(data, list) and len(data) == 2 and is_repo_id(data[0]) and is_revision(data[1])
    return (data[0], data[1]) if known else None
