"""The repositories a local Hub serves: commits, branches, tags, renames and who may read them."""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ..hub.names import is_repo_id

RepoType = Literal["kernel", "model", "dataset", "space"]
Tree = Mapping[str, str | bytes]

_SHORT_COMMIT = re.compile(r"[0-9a-f]{5,40}")


def git_blob_id(data: bytes) -> str:
    """Return git's name for bytes: the sha1 of a blob header and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_tree(files: Tree | Path) -> dict[str, bytes]:
    """Return the bytes of files by their path: every file under a folder, or texts and bytes that are given."""
    if not isinstance(files, Path):
        return {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    names = (path.relative_to(files) for path in files.rglob("*") if path.is_file())
    # Importing from a served folder writes byte code into it; that must not make a new commit.
    return {name.as_posix(): (files / name).read_bytes() for name in names if "__pycache__" not in name.parts}


@dataclass(frozen=True)
class Commit:
    """One immutable tree; its id follows from its parent and its contents."""

    files: Mapping[str, bytes]
    parent: str = ""

    @functools.cached_property
    def id(self) -> str:
        """The 40 hexadecimal digits that name this commit."""
        digest = hashlib.sha1(self.parent.encode())
        for path, data in sorted(self.files.items()):
            digest.update(f"\0{path}\0{git_blob_id(data)}".encode())
        return digest.hexdigest()

    def folders(self) -> set[str]:
        """Return the folders that contain at least one file, such as `build` and `build/cpu`."""
        return {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}


@dataclass
class Repository:
    """One repository: commits, and the branches and tags that name them.

    Example:
        >>> repository = Repository("acme/kernels")
        >>> first = repository.commit({"README.md": "hello"})
        >>> repository.tag("v1") == repository.head() == first
        True
    """

    id: str
    repo_type: RepoType = "kernel"
    private: bool = False
    gated: bool = False
    disabled: bool = False
    folder: Path | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    # A server thread may read while a test commits.
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def commit(self, files: Tree | Path, *, branch: str = "main") -> str:
        """Replace the whole tree of `branch`, which need not exist yet; return the new commit id."""
        contents = read_tree(files)
        with self._lock:
            # A served folder has no history: bytes that come back are the commit that they were.
            commit = Commit(contents, "" if self.folder else self.branches.get(branch, ""))
            self.commits[commit.id] = commit
            self.branches[branch] = commit.id
            return commit.id

    def branch(self, name: str, commit: str | None = None) -> str:
        """Point branch `name` at a revision (the head of main by default); return the commit id."""
        return self._point(self.branches, name, commit)

    def tag(self, name: str, commit: str | None = None) -> str:
        """Point tag `name` at a revision (the head of main by default); return the commit id."""
        return self._point(self.tags, name, commit)

    def head(self, branch: str = "main") -> str:
        """Return the commit id at the tip of `branch`."""
        self.refresh()
        return self.branches[branch]

    def files(self, revision: str = "main") -> Mapping[str, bytes]:
        """Return the files of a revision; change a copy and `commit` it for the next one."""
        self.refresh()
        return self.at(revision).files

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch or tag, also by its full name in git, or by its first digits."""
        with self._lock:
            branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
            named = self.branches.get(branch) or self.tags.get(tag)
            # Nothing shorter than the five digits of the pattern: it would match by chance.
            is_short = named is None and _SHORT_COMMIT.fullmatch(revision)
            matches = [known for known in self.commits if known == named or (is_short and known.startswith(revision))]
            if len(matches) != 1:
                raise KeyError(f"{self.id} has no revision {revision!r}")
            return self.commits[matches[0]]

    def refresh(self) -> None:
        """Read a repository that is a folder again, so that an edited file makes a new commit."""
        if self.folder is not None:
            self.commit(self.folder)

    def _point(self, names: dict[str, str], name: str, revision: str | None) -> str:
        self.refresh()
        with self._lock:
            names[name] = self.at(revision or "main").id
            return names[name]


class Repositories:
    """All repositories of one Hub, added by call or found as `<owner>/<name>` folders of a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        """Serve the folders of `directory`, if one is given, as kernel repositories."""
        self._directory = None if directory is None else Path(directory)
        self._known: dict[tuple[str, str], Repository] = {}
        self._moved: dict[tuple[str, str], str] = {}
        self._lock = threading.RLock()

    def add(
        self,
        repo_id: str,
        files: Tree | Path,
        *,
        repo_type: RepoType = "kernel",
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        disabled: bool = False,
    ) -> Repository:
        """Create a repository with one commit; `files` maps paths to contents or is a folder to copy."""
        repository = Repository(repo_id, repo_type, private, gated, disabled)
        repository.commit(files, branch=branch)
        with self._lock:
            if self.repository(repo_id, repo_type=repo_type) is not None:
                raise ValueError(f"there is already a {repo_type} repository {repo_id!r}")
            self._known[repo_type, repo_id] = repository
        return repository

    def repository(self, repo_id: str, *, repo_type: RepoType = "kernel") -> Repository | None:
        """Return the repository that has this id now, added or a folder of the directory, or None."""
        key = repo_type, repo_id
        with self._lock:
            # A renamed folder must not come back under its old id. An id is two plain names, so that no
            # request can climb out of the directory.
            is_new = repo_type == "kernel" and key not in self._known and key not in self._moved
            if is_new and self._directory is not None and is_repo_id(repo_id):
                folder = self._directory / repo_id
                if folder.is_dir():
                    self._known[key] = Repository(repo_id, folder=folder)
            found = self._known.get(key)
        if found is not None:
            found.refresh()
        return found

    def rename(self, old_id: str, new_id: str) -> None:
        """Rename the repositories called `old_id`, of whatever type; requests for the old id are redirected."""
        with self._lock:
            types = [kind for kind in get_args(RepoType) if self.repository(old_id, repo_type=kind)]
            if not types:
                raise KeyError(f"there is no repository {old_id!r}")
            for kind in types:
                repository = self._known.pop((kind, old_id))
                repository.id = new_id
                self._known[kind, new_id] = repository
                self._moved[kind, old_id] = new_id
                self._moved.pop((kind, new_id), None)
