"""The commands `kernels-core cache list`, `size`, `prune` and `verify`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from kernels_core import ArgumentError, IntegrityError, ResolutionError, Table, TableRow
from kernels_core import as_json as to_json
from kernels_core.cli import Json, Row, print_error, print_found

from ..builds.integrity import as_build, check_digest, check_transfer, read_files
from ..builds.metadata import METADATA
from ..locking.lockfile import LOCK, read_lock

if TYPE_CHECKING:
    from ..client.cached import CachedCommit, CachedKernels

T = TypeVar("T")

_DAY = 86_400.0

cache = typer.Typer(no_args_is_help=True, help="List, check and shrink the cache of kernels.")
Repositories = Annotated[
    list[str] | None, typer.Argument(metavar="REPO_ID", help="Only these repositories, as names or globs.")
]


@cache.command("list")
def list_kernels(repo_ids: Repositories = None, as_json: Json = False) -> None:
    """List the commits of kernels in the cache, the names that point to each, and its builds.

    A commit is verified if its builds were compared with the list of the Hub when they were loaded. It was used when
    one of its files was last read, or downloaded where the disk does not note reading.
    """
    found = _find(repo_ids)
    if as_json:
        print(to_json([_described(one) for one in found.commits]))
        return
    print_found(_table(found.commits) if found.commits else Table((), title=_nothing(found)))


@cache.command("size")
def show_size(repo_ids: Repositories = None, as_json: Json = False) -> None:
    """Show the disk space that kernels take, the largest repository first."""
    from ..client.cached import size_of

    found = _find(repo_ids)
    of: dict[str, list[CachedCommit]] = {}
    for one in found.commits:
        of.setdefault(one.repo_id, []).append(one)
    rows: list[Row] = [
        {"repository": name, "commits": len(own), "builds": sum(len(c.builds) for c in own), "size": size_of(own)}
        for name, own in of.items()
    ]
    rows.sort(key=lambda row: -row["size"])
    total = size_of(found.commits)
    if as_json:
        print(to_json({"cache": str(found.root), "size": total, "repositories": rows}))
    elif rows:
        cells = [TableRow((*tuple(row.values())[:-1], format_size(row["size"]))) for row in rows]
        summary = f"{format_size(total)} in {found.root}"
        print_found(Table(tuple(rows[0]), cells, summary=summary, right=("commits", "builds", "size")))
    else:
        print(_nothing(found))


@cache.command()
def prune(
    repo_ids: Repositories = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also commits that a branch, tag or version points to.")
    ] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Only commits that were not used for so many days.")
    ] = 0.0,
    project: Annotated[
        list[Path] | None,
        typer.Option(metavar="PROJECT_DIR", help="Keep the commits that this project has locked; may be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it, only show them.")] = False,
    as_json: Json = False,
) -> None:
    """Remove commits of kernels from the cache: by default those to which no branch, tag or version points any more.

    Commits that are locked, by the project in the current folder or by one that --project names, stay; so do files that
    a remaining commit has, too. A kernel that a program names by its commit has no such name: it would be downloaded
    again. Only shows the commits, unless --yes is given.
    """
    found = _find(repo_ids)
    places = project or ([Path()] if Path(LOCK).is_file() else [])
    locked = {kernel.commit for folder in places for kernel in read_lock(folder / LOCK).kernels}
    old = time.time() - older_than * _DAY
    chosen = [one for one in found.commits if (everything or not one.refs) and (not older_than or one.used < old)]
    kept = [one for one in chosen if one.commit in locked]
    chosen = [one for one in chosen if one.commit not in locked]
    plans = found.removals(chosen)
    freed = sum(plan.expected_freed_size for plan in plans)
    if yes:
        for plan in _progress(plans, "removing"):
            plan.execute()
    if as_json:
        rows = [_described(one) for one in chosen]
        print(to_json({"removed": yes, "freed": freed, "commits": rows, "locked": [_described(one) for one in kept]}))
        return
    if chosen:
        print_found(_table(chosen))
    if kept:
        print(f"{len(kept)} more stay, for they are locked in {', '.join(str(folder / LOCK) for folder in places)}.")
    if yes or not chosen:
        print(f"{len(chosen)} commits were removed, {format_size(freed)}." if chosen else "There is nothing to remove.")
    else:
        print(f"Nothing was removed. To remove these {len(chosen)} commits, {format_size(freed)}, add --yes.")


@cache.command()
def verify(repo_ids: Repositories = None, as_json: Json = False) -> None:
    """Compare the files of kernels in the cache with the list of the Hub and with the digests of their publishers.

    Sends no request: the list is the one that was kept when the kernel was loaded. Exits with 1 where a file differs,
    is missing or was added, or where the cache is damaged.
    """
    found = _find(repo_ids)
    builds = [(commit, build) for commit in found.commits for build in commit.builds]
    rows = [_verified(*build) for build in _progress(builds, "verifying")]
    ok = all(row["ok"] for row in rows) and not found.problems
    if as_json:
        print(to_json({"ok": ok, "builds": rows, "problems": found.problems}))
    elif rows:
        cells = [
            TableRow(
                (f"{row['repository']}@{row['commit'][:12]}", row["build"], row["result"]),
                "" if row["ok"] else "red",
                row["differences"],
                f"{row['repository']} {row['build']}",
            )
            for row in rows
        ]
        wrong = sum(not row["ok"] for row in rows)
        summary = f"{len(rows)} builds, {wrong} with differences"
        if wrong:
            summary += "\nRemove such a kernel, and load it again: kernels-core cache prune REPO_ID --all --yes"
        print_found(Table(("kernel", "build", "result"), cells, summary=summary))
    else:
        print(_nothing(found))
    raise typer.Exit(0 if ok else 1)


def _verified(commit: CachedCommit, build: str) -> Row:
    """Compare one build, and return its row."""
    folder = commit.folder / "build" / build
    row: Row = {"repository": commit.repo_id, "commit": commit.commit, "build": build, "ok": True}
    differences: list[str] = []

    def attempt(check: Any) -> str:
        try:
            return str(check())
        except (ResolutionError, OSError) as error:
            differences.append(str(error))
            return "differs" if isinstance(error, IntegrityError) else "unreadable"

    files = read_files(folder)
    listed = commit.record.variants.get(build) if commit.record is not None else None
    partly = files.keys() == {METADATA} != {file.path for file in listed or ()}  # as `info` and `lock` download it
    if partly and listed is not None:
        listed = tuple(file for file in listed if file.path == METADATA)
    row["listed"] = "no list is kept" if listed is None else attempt(lambda: check_transfer(files, listed))
    row["digest"] = "only metadata is here" if partly else attempt(lambda: check_digest(as_build(folder, files)))
    unknown = listed is None and (partly or row["digest"].startswith("not checked"))  # nothing to compare with
    result = "differs" if differences else "unknown" if unknown else "ok"
    return {**row, "result": result, "ok": not differences, "differences": differences}


# --- Their parts ---------------------------------------------------------------------------------


def _find(repo_ids: Sequence[str] | None) -> CachedKernels:
    """List the cache, or a part of it; report folders that the client cannot read."""
    from ..client.cached import find_cached  # imports huggingface_hub

    found = find_cached()
    for problem in found.problems:
        print_error(f"{problem} Remove the folder, and load the kernel again.")
    if not repo_ids:
        return found
    commits = [one for one in found.commits if any(fnmatchcase(one.repo_id, glob) for glob in repo_ids)]
    unknown = [glob for glob in repo_ids if not any(fnmatchcase(one.repo_id, glob) for one in found.commits)]
    if unknown:
        known = ", ".join(sorted({one.repo_id for one in found.commits})) or "none"
        raise ArgumentError(f"The cache {found.root} has no kernel {', '.join(unknown)}: it has {known}.")
    return replace(found, commits=tuple(commits))


def _progress(items: Sequence[T], text: str) -> Iterator[T]:
    """Yield items, with a bar on a terminal."""
    console = Console(stderr=True)
    yield from track(items, text, console=console) if console.is_terminal else items


def _nothing(found: CachedKernels) -> str:
    return f"There are no kernels in {found.root}. KERNELS_CACHE and HF_HUB_CACHE name another cache."


def _described(one: CachedCommit) -> Row:
    from ..client.cached import size_of

    named = {"repository": one.repo_id, "commit": one.commit, "refs": one.refs, "builds": one.builds}
    used = datetime.fromtimestamp(one.used).astimezone().isoformat(timespec="seconds")
    return {**named, "size": size_of([one]), "used": used, "verified": one.verified}


def _table(commits: Sequence[CachedCommit]) -> Table:
    """Return commits as people read them: the names of builds are in the JSON, and in `cache verify`."""
    rows = []
    for one in commits:
        row = _described(one)
        cells = (one.repo_id, one.commit[:12], one.refs, len(one.builds), format_size(row["size"]), row["used"][:10])
        rows.append(TableRow(cells, notes=() if one.verified else ["not verified: kernels-core has not loaded it"]))
    return Table(("repository", "commit", "refs", "builds", "size", "used"), rows, right=("builds", "size"))


def format_size(size: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> format_size(999), format_size(51_234_567)
        ('999 B', '51.2 MB')
    """
    if size < 1000:
        return f"{size} B"
    number, unit = float(size), 0
    while number >= 999.95 and unit < 4:
        number, unit = number / 1000, unit + 1
    return f"{number:.1f} {'BkMGT'[unit]}B"
