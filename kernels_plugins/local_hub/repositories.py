"""The repositories a local Hub serves: commits, branches, tags, renames and who may read them."""

from __future__ import annotations

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
    """Return the name that git gives to bytes: the sha1 of a blob header and the bytes.

    Example:
        >>> git_blob_id(b"")
        'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_tree(folder: Path) -> dict[str, bytes]:
    """Read every file under `folder`, keyed by its path relative to it."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    # Importing from a served folder writes byte code into it; that must not make a new commit.
    return {name.as_posix(): (folder / name).read_bytes() for name in names if "__pycache__" not in name.parts}


@dataclass(frozen=True)
class Commit:
    """One immutable tree; its id follows from its parent and its contents."""

    files: Mapping[str, bytes]
    parent: str = ""
    message: str = ""

    @property
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
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def commit(self, files: Tree | Path, *, branch: str = "main", message: str = "") -> str:
        """Replace the whole tree of `branch`, which need not exist yet; return the new commit id."""
        tree = read_tree(files) if isinstance(files, Path) else files
        contents = {path: data.encode() if isinstance(data, str) else data for path, data in tree.items()}
        with self._lock:
            return self._store(Commit(contents, self.branches.get(branch, ""), message), branch)

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
        return self._at(revision)[1].files

    def find(self, revision: str) -> tuple[str, Commit] | None:
        """Return the commit of a branch or tag, also by its full name in git, or by its first digits; else None."""
        with self._lock:
            branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
            commit_id = self.branches.get(branch) or self.tags.get(tag)
            if commit_id is None and _SHORT_COMMIT.fullmatch(revision):
                matches = [known for known in self.commits if known.startswith(revision)]
                commit_id = matches[0] if len(matches) == 1 else None
            return (commit_id, self.commits[commit_id]) if commit_id else None

    def refresh(self) -> None:
        """Read a repository that is a folder again, so that an edited file makes a new commit."""
        if self.folder is None:
            return
        commit = Commit(read_tree(self.folder))
        with self._lock:
            self._store(commit, "main")

    def _store(self, commit: Commit, branch: str) -> str:
        commit_id = commit.id
        self.commits[commit_id] = commit
        self.branches[branch] = commit_id
        return commit_id

    def _point(self, names: dict[str, str], name: str, revision: str | None) -> str:
        self.refresh()
        with self._lock:
            names[name], _ = self._at(revision or "main")
            return names[name]

    def _at(self, revision: str) -> tuple[str, Commit]:
        found = self.find(revision)
        if found is None:
            raise KeyError(f"{self.id} has no revision {revision!r}")
        return found


class Repositories:
    """All repositories of one Hub, added by call or found as `<owner>/<name>` folders of a directory.

    Example:
        >>> repositories = Repositories()
        >>> repositories.add(Repository("acme/kernels"))
        >>> repositories.rename("acme/kernels", "acme/layers")
        >>> repositories.moved("kernel", "acme/kernels")
        'acme/layers'
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Serve the folders of `directory`, if one is given, as kernel repositories."""
        self._directory = directory
        self._known: dict[tuple[str, str], Repository] = {}
        self._moved: dict[tuple[str, str], str] = {}
        self._lock = threading.RLock()

    def add(self, repository: Repository) -> None:
        """Add a repository; its id must be free."""
        with self._lock:
            if self.find(repository.repo_type, repository.id) is not None:
                raise ValueError(f"there is already a {repository.repo_type} repository {repository.id!r}")
            self._known[repository.repo_type, repository.id] = repository

    def find(self, repo_type: str, repo_id: str) -> Repository | None:
        """Return the repository that has this id now, or None."""
        with self._lock:
            found = self._known.get((repo_type, repo_id))
            if found is None and (repo_type, repo_id) not in self._moved and repo_type == "kernel":
                found = self._open(repo_id)
        if found is not None:
            found.refresh()
        return found

    def moved(self, repo_type: str, repo_id: str) -> str | None:
        """Return the new id of a renamed repository, or None."""
        with self._lock:
            return self._moved.get((repo_type, repo_id))

    def rename(self, old_id: str, new_id: str) -> None:
        """Give the repositories called `old_id`, of whatever type, the name `new_id`."""
        with self._lock:
            types = [kind for kind in get_args(RepoType) if self.find(kind, old_id)]
            if not types:
                raise KeyError(f"there is no repository {old_id!r}")
            for repo_type in types:
                repository = self._known.pop((repo_type, old_id))
                repository.id = new_id
                self._known[repo_type, new_id] = repository
                self._moved[repo_type, old_id] = new_id
                self._moved.pop((repo_type, new_id), None)

    def _open(self, repo_id: str) -> Repository | None:
        # An id is two plain names, so that no request can climb out of the directory.
        if self._directory is None or not is_repo_id(repo_id) or not (self._directory / repo_id).is_dir():
            return None
        self._known["kernel", repo_id] = repository = Repository(repo_id, folder=self._directory / repo_id)
        return repository
