"""The commands of the plugin `hub`: lock and download kernels, and list versions and builds."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from kernels_core import ArgumentError, KernelsError, KernelsWarning, LoadError, visible
from kernels_core.cli import Json, Row, print_error, print_rows

from . import fetching
from .builds.metadata import METADATA, Metadata
from .builds.selection import choose_here, local_builds
from .builds.variants import parse_variant
from .dependency import Dependency
from .errors import AbsentError
from .locking.lockfile import LOCK, NOTHING, Lock, LockedKernel, read_lock, write_lock
from .locking.maker import Report, make_lock
from .locking.project import PYPROJECT, read_dependencies
from .request import KernelRequest, locked_request

Project = Annotated[Path, typer.Argument(metavar="PROJECT_DIR", help="The project's folder.")]
Repository = Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository, as owner/name.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit.")]
Version = Annotated[int | None, typer.Option(help="The number of a version.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="REPO_ID",
        help="Allow this repository though its publisher is not trusted; may be repeated.",
    ),
]


def lock(
    project_dir: Project,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if the lock is out of date.")
    ] = False,
    upgrade: Annotated[
        list[str] | None,
        typer.Option(metavar="REPO_ID", help="Give only this repository its newest commit; may be repeated."),
    ] = None,
    trust_remote_code: Trust = None,
    as_json: Json = False,
) -> None:
    """Lock the kernels that a project depends on, and those that they depend on.

    Reads [tool.kernels.dependencies] in pyproject.toml, asks the Hub for the commits of those versions, and
    writes kernels.lock and kernels.hashes: all build variants, for every machine. Prints what changed.
    """
    keep_client_quiet()
    path, wanted = project_dir / LOCK, read_dependencies(project_dir)
    before = NOTHING
    if path.exists():
        # A malformed one is written anew, but for those that need it.
        with nullcontext() if check or upgrade else suppress(ArgumentError):
            before = read_lock(path)
    kept = Lock(tuple(kernel for kernel in before.kernels if upgrade and kernel.dependency.repo_id not in upgrade))
    with _bars() as report:
        made = make_lock(wanted, kept=kept, trust=trust_remote_code or (), report=report)
    locked = {kernel.dependency.repo_id for kernel in made.kernels}
    if unknown := sorted(set(upgrade or ()) - locked):
        there = ", ".join(sorted(locked))
        raise ArgumentError(
            f"The project does not depend on {', '.join(unknown)}: it locks {there}. Nothing was written."
        )
    if not check:
        write_lock(path, made)
    changes = made.changes(before)
    print_rows([_changed(*change) for change in changes] if check else _locked_rows(made, changes), as_json)
    if check and changes:
        again = f" --upgrade {upgrade[0]}" if upgrade else ""
        _note(f"{path} is out of date: run `kernels-core lock {project_dir}{again}`.", always=True)
        raise typer.Exit(1)


def download(
    project_dir: Project,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="All builds, not only the one for this machine.")
    ] = False,
    trust_remote_code: Trust = None,
    as_json: Json = False,
) -> None:
    """Download the kernels that a project has locked, and check them, for a start without network.

    Exits with 1 where a kernel has no build for this machine, with 2 where one cannot be downloaded or is not the one
    that was locked; the others are downloaded all the same.
    """
    keep_client_quiet()
    locked = read_lock(project_dir / LOCK)
    _warn_of_old_lock(project_dir, locked)
    rows: list[Row] = []
    code = 0
    for kernel in locked.kernels:
        _note(f"downloading {kernel.dependency} ({kernel.commit[:12]})")
        try:
            # Dependencies are not followed: each has an entry of its own in the lock.
            request = locked_request(locked, kernel, trust_remote_code=trust_remote_code or ())
            for fetched in map(fetching.fetch_build, selected_builds(request, all_variants)):
                checked = {"files": len(fetched.build.files), "lock": fetched.checked.get("lock", "")}
                rows.append({**_named(kernel), "variant": fetched.selected.variant, **checked})
        except KernelsError as error:
            print_error(error)
            code = max(code, 1 if isinstance(error, AbsentError) else 2)
    print_rows(rows, as_json)
    raise typer.Exit(code)


def info(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="A repository, as owner/name, or a folder.")],
    revision: Revision = None,
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Describe a kernel, in a repository or in a folder on disk.

    By default, the newest version of a repository.
    """
    keep_client_quiet()
    if Path(kernel).is_dir():
        if revision is not None or version is not None:
            raise ArgumentError(f"{kernel} is a folder: it has neither revisions nor versions; leave both out.")
        described = _describe_folder(Path(kernel))
    elif kernel.startswith(("/", ".", "~", "\\")):
        raise ArgumentError(f"There is no folder {kernel!r}: check the path, or name a repository as owner/name.")
    else:
        described = _describe_repository(kernel, revision, version)
    if as_json:
        print(json.dumps(described, indent=2))
        return
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for key, value in described.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        console.print(f"{_TITLES[key]}:", style="bold", end=" ")
        console.print("-" if text in (None, "") else visible(str(text)))


def versions(repo_id: Repository, as_json: Json = False) -> None:
    """List the versions of a kernel, with the builds of each, those for this machine first.

    Exits with 1 where there are none.
    """
    keep_client_quiet()
    known = [(number, commit, _builds_at(repo_id, commit)) for number, commit in sorted(_list(repo_id).items())]
    if as_json:
        print(json.dumps([{"version": n, "commit": commit, "variants": rows} for n, commit, rows in known], indent=2))
    else:
        nothing: list[Row] = [{"variant": "", "fits": False, "reason": "it has no builds"}]
        print_rows([{"version": n, **row} for n, _, rows in known for row in rows or nothing], style=_style)
    if not known:
        _note(f"{repo_id} has no versions, which are branches such as v1: name a revision instead.", always=True)
        raise typer.Exit(1)


def variants(repo_id: Repository, revision: Revision = None, version: Version = None, as_json: Json = False) -> None:
    """List the builds of a kernel: those for this machine, the best first, and why the others are not.

    By default, of the newest version. Exits with 1 where none is for this machine.
    """
    keep_client_quiet()
    rows = _builds(_resolve(repo_id, revision, version))
    print_rows(rows, as_json, style=_style)
    if not any(row["fits"] for row in rows):
        raise typer.Exit(1)


# --- Requests ------------------------------------------------------------------------------------


def selected_builds(request: KernelRequest, all_variants: bool) -> list[fetching.SelectedBuild]:
    """Select the best build of a kernel, or each."""
    if not all_variants:
        return [fetching.select_build(request)]
    resolved = fetching.resolve_kernel(request)
    return [resolved.build(name) for name in resolved.variants if parse_variant(name) is not None]


def _locked_rows(made: Lock, changes: Sequence[tuple[LockedKernel | None, LockedKernel | None]]) -> list[Row]:
    """Return a row for each kernel of a lock, with its change, and for each that is no longer in it."""
    changed = {now.dependency: _changed(was, now) for was, now in changes if now is not None}
    rows = [changed.get(kernel.dependency) or _changed(kernel, kernel) for kernel in made.kernels]
    return rows + [_changed(was, None) for was, now in changes if now is None]


def _warn_of_old_lock(folder: Path, locked: Lock) -> None:
    """Warn of kernels that the project names, and the lock does not have."""
    try:
        missing = [str(wanted) for wanted in read_dependencies(folder) if locked.find(wanted) is None]
    except ArgumentError:  # `lock` reports a malformed table; here, the lock is used
        return
    if missing:
        warnings.warn(
            f"{folder / PYPROJECT} names {', '.join(missing)}, and {folder / LOCK} does not have that: run "
            f"`kernels-core lock {folder}`.",
            KernelsWarning,
            stacklevel=2,
        )


def request_to_read(repo_id: str, revision: str | None, version: int | None) -> KernelRequest:
    """Request a kernel to look at, by default its newest version, or main.

    Its publisher need not be trusted, as no code of it is run.
    """
    revision, version = by_default(repo_id, revision, version)
    return KernelRequest(repo_id, revision=revision, version=version, trust_remote_code=True)


def _resolve(repo_id: str, revision: str | None, version: int | None) -> fetching.ResolvedKernel:
    return fetching.resolve_kernel(request_to_read(repo_id, revision, version))


def by_default(repo_id: str, revision: str | None, version: int | None) -> tuple[str | None, int | None]:
    """Return revision and version as they are given; where neither is, the newest version, or main."""
    if revision is None and version is None:
        known = _list(repo_id)
        return (None, max(known)) if known else ("main", None)
    return revision, version


def _list(repo_id: str) -> dict[int, str]:
    """Return the commit of each version."""
    from .client.download import Client

    KernelRequest(repo_id, revision="main")  # refuses a malformed name
    with fetching.naming(repo_id):
        return Client().list_versions(repo_id)


def _describe_repository(repo_id: str, revision: str | None, version: int | None) -> Row:
    found = _resolve(repo_id, revision, version)
    builds = {name: files for name, files in found.variants.items() if parse_variant(name) is not None}
    if not builds:
        raise LoadError(f"{found.request}: it has no builds. Name another revision, or ask the publisher for builds.")
    described = next((n for n, files in builds.items() if METADATA in {file.path for file in files}), None)
    metadata = fetching.read_metadata(found, described) if described is not None else None
    place = {"repo_id": repo_id, "revision": found.request.wanted, "commit": found.pin.commit}
    return {**place, **_describe(metadata, builds)}


def _describe_folder(folder: Path) -> Row:
    single = (folder / METADATA).is_file()
    places = [folder.resolve()] if single else [p for p in local_builds(folder) if parse_variant(p.name) is not None]
    if not places:
        raise LoadError(f"{folder} has no builds: name the folder of a kernel, which has a folder `build`.")
    described = next((place / METADATA for place in places if (place / METADATA).is_file()), None)
    metadata = Metadata.read_from_file(described) if described is not None else None
    return {"path": str(folder), **_describe(metadata, [place.name for place in places])}


_TITLES = {
    "repo_id": "Repository",
    "path": "Path",
    "revision": "Revision",
    "commit": "Commit",
    "name": "Name",
    "version": "Version",
    "kernels_minver": "Minimum kernels version",
    "license": "License",
    "upstream": "Upstream",
    "source": "Source",
    "python_depends": "Python dependencies",
    "kernel_depends": "Kernel dependencies",
    "backends": "Backends",
}


def _describe(metadata: Metadata | None, builds: Iterable[str]) -> Row:
    """Describe a kernel by one of its builds: they differ only in the backend they were built for."""
    kinds = {variant.backend for name in builds if (variant := parse_variant(name)) is not None}
    known = {name: _plain(getattr(metadata, name)) for name in _TITLES if hasattr(metadata, name)}
    return {**known, "backends": sorted("cann" if kind == "npu" else kind for kind in kinds)}


def _plain(value: Any) -> Any:
    """Return a value of the metadata as JSON holds it."""
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return value if value is None or isinstance(value, int) else str(value)


def _builds_at(repo_id: str, commit: str) -> list[Row]:
    try:
        return _builds(_resolve(repo_id, commit, None))
    except AbsentError:  # no folder `build`
        return []


def _builds(found: fetching.ResolvedKernel) -> list[Row]:
    """Return a row per build, those that fit first."""
    choice = choose_here(found.variants)
    fitting: list[Row] = [{"variant": str(variant), "fits": True, "reason": ""} for variant in choice.accepted]
    return fitting + [{"variant": name, "fits": False, "reason": reason} for name, reason in choice.rejected]


# --- Output --------------------------------------------------------------------------------------


def _named(kernel: LockedKernel) -> Row:
    wanted = kernel.dependency
    pin = f"version {wanted.version}" if wanted.version is not None else wanted.revision or ""
    return {"kernel": wanted.repo_id, "wanted": pin, "commit": kernel.commit[:12]}


def _changed(was: LockedKernel | None, now: LockedKernel | None) -> Row:
    """Return the row of a kernel, as it was locked and as it is."""
    shown = now or was
    assert shown is not None
    change = "removed" if now is None else "new" if was is None else "" if was == now else f"from {was.commit[:12]}"
    if was is not None and now is not None and was.commit == now.commit and was != now:
        change = "version" if was.dependency != now.dependency else "hashes"
    return {**_named(shown), "change": change, "variants": [name for name, _ in shown.hashes]}


def _style(row: Row) -> str:
    return "green" if row["fits"] else "dim"


def _note(message: str, *, always: bool = False) -> None:
    """Print a note for a person: nothing but the result is printed into a pipe."""
    if always or sys.stderr.isatty():
        print(message, file=sys.stderr)


def keep_client_quiet() -> None:
    """Let the Hub's client draw its bars only on a terminal; it reads this variable once, when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _bars() -> Iterator[Report]:
    """Draw a bar per kernel while it is locked, on a terminal; yield the function that locking calls as it proceeds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("variants"))
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    tasks: dict[Dependency, TaskID] = {}

    def report(dependency: Dependency, done: int, total: int) -> None:
        if dependency not in tasks:
            tasks[dependency] = progress.add_task(str(dependency), total=total)
        progress.update(tasks[dependency], completed=done, total=total)

    # With rich 13.0, `stop` prints the end of a line also where no bar is shown.
    with progress if console.is_terminal else nullcontext():
        yield report
