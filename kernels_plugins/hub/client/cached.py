"""The kernels in the cache: their commits, the names that point to these, and their removal by the Hub's client."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernels_core import LoadError

from ..builds.variants import parse_variant
from ..errors import UnsuitableError
from ..names import is_commit
from .download import REPO_TYPES, cache_folder, cache_root
from .metadata_cache import MetadataCache, Pin, Record
from .revision import BRANCH, SERVED

_UNKNOWN_TYPE = "Repo type must be"
"""In a message of clients before 1.32 (the release 1.10 loads kernels, and does not list them)."""


@dataclass(frozen=True)
class CachedCommit:
    """One commit of a kernel, with the builds of it that were downloaded."""

    repo_id: str
    repo_type: str  # `kernel`, or `model` for the older form
    commit: str
    folder: Path
    refs: tuple[str, ...]  # the branches, tags and versions that pointed to it when they were last loaded
    builds: tuple[str, ...]
    blobs: Mapping[Path, int]  # its files on disk, with their bytes: two commits may share some
    used: float  # when a file of it was last read, or was downloaded where the disk does not note that
    record: Record | None  # the list of the Hub; None where kernels-core has not loaded this commit

    @property
    def verified(self) -> bool:
        """Whether each build was compared with the list of the Hub when it was loaded, and can be again."""
        return self.record is not None and self.record.variants.keys() >= set(self.builds)


@dataclass(frozen=True)
class CachedKernels:
    """All kernels in a cache."""

    root: Path
    commits: tuple[CachedCommit, ...]
    problems: tuple[str, ...]  # folders that the client cannot read
    _scanned: Any  # as the client found them

    def removals(self, commits: Collection[CachedCommit]) -> list[Any]:
        """Return the client's plan for each repository to remove commits: `expected_freed_size`, and `execute()`.

        Files that another commit of the repository has, too, stay.
        """
        chosen = {one.folder for one in commits}
        plans = []
        # One plan a repository: the client takes only commits, and a copy of a repository has the same ones.
        for repo in self._scanned.repos if chosen else ():
            if found := [revision.commit_hash for revision in repo.revisions if revision.snapshot_path in chosen]:
                plans.append(replace(self._scanned, repos=frozenset([repo])).delete_revisions(*found))
        return plans


def size_of(commits: Iterable[CachedCommit]) -> int:
    """Return the bytes of some commits on disk, each file once."""
    return sum({place: size for commit in commits for place, size in commit.blobs.items()}.values())


def find_cached() -> CachedKernels:
    """List the kernels in the cache: repositories of the type, and models that have builds.

    Raises:
        LoadError: If the folder of the cache cannot be read, or the client is too old to list kernels.
    """
    # `download`, which is imported before, says what is wrong where the client cannot be.
    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    root = cache_root()
    try:
        scanned = huggingface_hub.scan_cache_dir(root)
    except CacheNotFound:
        return CachedKernels(root, (), (), None)
    except (OSError, ValueError) as error:
        raise LoadError(f"The cache {root} cannot be read: {error}") from error
    # A folder without snapshots holds only notes of ours, such as those of a repository that was moved.
    problems = [
        text
        for text in map(str, scanned.warnings)
        if (name := re.search(r"kernels--[\w.-]+", text)) and (root / name[0] / "snapshots").is_dir()
    ]
    if any(_UNKNOWN_TYPE in text for text in problems):
        raise UnsuitableError(
            f"huggingface_hub {huggingface_hub.__version__} does not list kernels in its cache {root}: upgrade it to "
            "1.32 or newer, with pip install -U huggingface_hub"
        )
    refs = _refs(root)
    commits = []
    for repo in scanned.repos:
        notes = MetadataCache(cache_folder(repo.repo_id, REPO_TYPES[0]))
        for revision in repo.revisions:
            paths = [file.file_path.relative_to(revision.snapshot_path).parts for file in revision.files]
            builds = {parts[1] for parts in paths if parts[0] == "build" and len(parts) > 2 and parse_variant(parts[1])}
            if repo.repo_type not in REPO_TYPES or (repo.repo_type != REPO_TYPES[0] and not builds):
                continue
            pointing = refs.get(Pin(repo.repo_id, repo.repo_type, revision.commit_hash), set())
            commits.append(
                CachedCommit(
                    repo.repo_id,
                    repo.repo_type,
                    revision.commit_hash,
                    revision.snapshot_path,
                    tuple(sorted({*revision.refs, *pointing})),
                    tuple(sorted(builds)),
                    {file.blob_path: file.size_on_disk for file in revision.files},
                    max((file.blob_last_accessed for file in revision.files), default=revision.last_modified),
                    notes.record(revision.commit_hash),
                )
            )
    commits.sort(key=lambda one: (one.repo_id, one.repo_type, -one.used, one.commit))
    return CachedKernels(root, tuple(commits), tuple(problems), scanned)


def _refs(root: Path) -> dict[Pin, set[str]]:
    """Return the names that pointed to each commit when they were last loaded.

    The client keeps none: files are requested by commit. A commit that was requested as such has no name.
    """
    found: dict[Pin, set[str]] = {}
    for folder in root.glob(f"{REPO_TYPES[0]}s--*"):
        repo_id = folder.name.partition("--")[2].replace("--", "/")
        for name, pin in MetadataCache(folder).pins().items():
            if not is_commit(name) and not name.startswith(SERVED):
                short = name.removeprefix(BRANCH)
                found.setdefault(pin, set()).add(short if pin.repo_id == repo_id else f"{repo_id}@{short}")
    return found
