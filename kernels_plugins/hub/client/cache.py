"""What was learned about repositories, kept beside the files in the client's cache.

For each repository: which commit a revision was, who was trusted, and which files the Hub listed
for a commit. With that, what was loaded once loads again without a request.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..builds.integrity import RemoteFile

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Pin:
    """A repository at one commit.

    Attributes:
        repo_id: The repository that serves it, after redirects.
        repo_type: `kernel`, or `model` for the older form.
        commit: 40 hexadecimal digits.
    """

    repo_id: str
    repo_type: str
    commit: str

    def __str__(self) -> str:
        """Name repository and commit."""
        return f"{self.repo_id}@{self.commit[:12]}"


@dataclass(frozen=True)
class Record:
    """What is known about a pin.

    Attributes:
        publisher_trusted: Whether the Hub listed the publisher as trusted when this was downloaded.
        variants: The files of each build variant, as the Hub lists them.
        redirect: Repository and revision that it says to take instead; empty if it says none, None if that was not
            asked yet.
    """

    publisher_trusted: bool = False
    variants: dict[str, tuple[RemoteFile, ...]] = field(default_factory=dict)
    redirect: tuple[str, ...] | None = None


class Notes:
    """The notes of one repository folder in the cache."""

    def __init__(self, folder: Path) -> None:
        """Keep notes in `folder`, which is made when something is written."""
        self._folder = folder / "kernels-core"

    def pin(self, revision: str) -> Pin | None:
        """Return what a revision was when it was last loaded."""
        data = self._read(self._revision(revision))
        with contextlib.suppress(KeyError, TypeError):
            pin = Pin(data["repo_id"], data["repo_type"], data["commit"])
            return pin if COMMIT.fullmatch(pin.commit) else None
        return None

    def write_pin(self, revision: str, pin: Pin) -> None:
        """Remember what a revision is."""
        self._write(self._revision(revision), asdict(pin))

    def record(self, commit: str) -> Record | None:
        """Return what is known about a commit."""
        data = self._read(self._commit(commit))
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            variants = {name: tuple(RemoteFile(**file) for file in files) for name, files in data["variants"].items()}
            return Record(data["publisher_trusted"] is True, variants, _redirect(data.get("redirect")))
        return None

    def write_record(self, commit: str, record: Record) -> None:
        """Remember what is known about a commit."""
        self._write(self._commit(commit), asdict(record))

    def trust(self, commit: str) -> None:
        """Remember that the publisher was trusted."""
        self.write_record(commit, replace(self.record(commit) or Record(), publisher_trusted=True))

    def newest(self) -> int | None:
        """Return the newest version, when that was last asked."""
        data = self._read(self._folder / "versions.json")
        newest = data.get("newest") if isinstance(data, dict) else None
        return newest if type(newest) is int else None

    def write_newest(self, version: int) -> None:
        """Remember the newest version."""
        self._write(self._folder / "versions.json", {"newest": version})

    def _revision(self, revision: str) -> Path:
        return self._folder / "revisions" / f"{quote(revision, safe='')}.json"

    def _commit(self, commit: str) -> Path:
        return self._folder / "commits" / f"{commit}.json"

    def _read(self, path: Path) -> Any:
        """Read a note; one that cannot be read or understood counts as none, and is written anew."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            return json.loads(path.read_text())
        return None

    def _write(self, path: Path, data: dict[str, Any]) -> None:
        """Write a note, where that is possible: a cache may be read-only, and costs a request more then."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(data, file)
                os.replace(temporary, path)  # whole or not at all, also with two processes at it
            except BaseException:
                os.unlink(temporary)
                raise


def _redirect(data: Any) -> tuple[str, ...] | None:
    known = isinstance(data, list) and len(data) in (0, 2) and all(isinstance(part, str) and part for part in data)
    return tuple(data) if known else None
