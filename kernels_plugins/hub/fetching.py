"""The way of a kernel from its name to checked files, step by step. No code of the kernel runs here.

Each step returns the input of the next one: `resolve_kernel`, `select_build`, `fetch_build`. `install` takes all of
them, also for the kernels that a kernel depends on, and `hub.kernel.load` imports the result. Locks are made from
`ResolvedKernel.variants`, which has the files of every build, also of those for other machines.

Errors are kinds of `ResolutionError` that name repository or folder, revision, variant and what to do. All steps work
offline with kernels that were loaded before, and with `local_files_only=True` as with `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from kernels_core import IntegrityError, LoadError, ResolutionError, authorize, device_capability, plugin_manager

from ..locks import KeyedLocks
from .builds.integrity import Build, RemoteFile, as_build, check_digest, check_transfer, read_files
from .builds.metadata import METADATA, Metadata
from .builds.selection import choose_here, local_variant, select_variant
from .client.metadata_cache import Pin
from .client.overrides import VARIABLE, find_override
from .errors import AbsentError, UnknownError
from .locking.lockfile import hash_variant
from .request import KernelRequest, RepoInfo, RequestOptions
from .signatures.checking import check_signature

PLUGIN = "hub"
"""The plugin that loads kernels from the Hub: where it is left out, nothing does."""
_MOST_VERSIONS = 5  # that are tried for a suggestion

_LONGEST_DOWNLOAD = 600.0
"""Seconds to wait for another process that downloads a build, before this one does."""

_files = KeyedLocks()
"""One thread at a time changes the files of a build."""


@dataclass(frozen=True)
class ResolvedKernel:
    """A kernel on the Hub: its commit, and the builds of that commit."""

    request: KernelRequest  # the request
    pin: Pin  # the repository that serves it, and the commit
    variants: Mapping[str, tuple[RemoteFile, ...]]  # the files of each build, as the Hub lists them
    # the checks that were passed, in words: `trust` and `revision`; `redirect`, if it was redirected
    checked: Mapping[str, str]
    first: Pin  # the commit before redirects, of the repository in the request

    def build(self, variant: str) -> SelectedBuild:
        """Return a build of it, whether or not that fits this machine."""
        from .client.download import variant_folder

        asked = f"{self.request} (commit {self.pin.commit[:12]})"
        return SelectedBuild(variant, variant_folder(self.pin, variant), self, asked)


@dataclass(frozen=True)
class SelectedBuild:
    """A build of a kernel."""

    variant: str  # its name, which is that of its folder
    folder: Path  # where its files lie, or will once they are downloaded
    resolved: ResolvedKernel | None  # the kernel on the Hub; None for one on disk
    asked: str  # the kernel or place that was requested, for messages

    @property
    def origin(self) -> str:
        """One line that names it."""
        return f"{self.resolved.pin} ({self.variant})" if self.resolved else str(self.folder)

    @property
    def place(self) -> str:
        """The request and the build, for messages."""
        return f"{self.asked}, variant {self.variant}"


@dataclass(frozen=True)
class FetchedBuild:
    """A build whose files are on disk, and passed the checks."""

    selected: SelectedBuild  # which build
    build: Build  # its files and metadata, in memory
    checked: Mapping[str, str]  # the checks that were passed, in words
    # the kernels that it depends on, by repository
    dependencies: Mapping[str, FetchedBuild] = field(default_factory=dict)


# --- The steps -----------------------------------------------------------------------------------


def resolve_kernel(request: KernelRequest) -> ResolvedKernel:
    """Find the commit of a kernel, whether its code may run, and its builds; download nothing, but for a redirect."""
    with naming(str(request)):
        from .client import revision, trust  # import huggingface_hub: only when a repository is really requested

        client = _client(request)
        if not plugin_manager().allows(PLUGIN):
            raise LoadError(f"the plugin {PLUGIN!r} is left out by KERNELS_PLUGINS, or the setting plugins")
        pinned = revision.find_revision(request, client)
        # Before the listing: of a publisher that is not trusted, nothing is listed or fetched.
        checked = {"trust": trust.require_trust(request, pinned.pin, client), "revision": pinned.how}
        if pinned.redirect:
            checked["redirect"] = pinned.redirect
        variants = revision.find_record(pinned.pin, client).variants
        if not variants:
            raise AbsentError("it has no folder `build`, so it is no kernel repository (or was never built)")
        revision.report_newer(request)
    return ResolvedKernel(request, pinned.pin, variants, checked, pinned.first)


def select_build(request: KernelRequest, *, suggest: bool = True) -> SelectedBuild:
    """Find the build that fits this machine best, and ask the policies about its commit; download nothing."""
    resolved = resolve_kernel(request)
    with naming(str(request)):
        authorize(RepoInfo(resolved.pin.repo_id, resolved.pin.commit), PLUGIN)
        try:
            name = _select(resolved)
        except AbsentError as error:
            if not suggest or request.commit is not None:
                raise
            raise AbsentError(f"{error}{_suggestion(resolved)}") from error
    return resolved.build(name)


def fetch_build(selected: SelectedBuild, *, verify: bool = True) -> FetchedBuild:
    """Download a build, whether or not it fits, unless it is in the cache; read it, and check files and signature."""
    from .client import download, files, revision

    resolved = selected.resolved
    assert resolved is not None
    request, pin, first = resolved.request, resolved.pin, resolved.first
    with naming(selected.place), _files.hold(selected.folder):
        lock = _check_lock(request, selected.variant, resolved)
        try:
            build, transfer = _read(selected, resolved, _client(request))
            digest = check_digest(build)
        except IntegrityError:
            revision.forget_record(pin)  # the listing may be wrong, not the files
            files.discard(selected.folder)
            raise
        # Not a fault of the download, as those above: what is refused here stays in the cache.
        signature = check_signature(build, pin.repo_id, selected.place) if verify else {}
        # Written only now: a listing that the files do not match would refuse them for ever.
        revision.keep_record(pin)
        cache = download.metadata_cache(request.repo_id)
        if request.commit is None:
            cache.write_pin(request.ref, pin)
        if request.ref != request.wanted:
            cache.write_pin(revision.SERVED + first.commit, first)
        cache.write_pin(first.commit, pin)
        if pin.repo_id != request.repo_id:
            download.metadata_cache(pin.repo_id).write_pin(pin.commit, pin)
    return FetchedBuild(
        selected, build, {"digest": digest, "transfer": transfer, **signature, **resolved.checked, **lock}
    )


def install(request: KernelRequest) -> FetchedBuild:
    """Fetch and check the build that fits, and those of all kernels that it depends on."""
    return _install(request, (), {})


def install_folder(path: Path, options: RequestOptions) -> FetchedBuild:
    """Read the build in a folder that fits, check its digest, and install all that it depends on."""
    return _with_dependencies(_read_folder(path, options, str(path)), options, (), {})


def read_metadata(resolved: ResolvedKernel, variant: str) -> Metadata:
    """Return the metadata of a build; downloads that file, and no other, if it is not in the cache."""
    build = resolved.build(variant)
    with naming(build.place):
        listed = next((file for file in resolved.variants[variant] if file.path == METADATA), None)
        if listed is None:
            raise LoadError(f"it has no {METADATA}. Rebuild the kernel with a current kernel builder.")
        path = build.folder / METADATA
        if not path.is_file():
            # Only this: a build for another machine may be large.
            path = _client(resolved.request).fetch_file(resolved.pin, f"build/{variant}/{METADATA}")
        content = path.read_bytes()
        _check_transfer(path, {METADATA: content}, [listed])
        return Metadata.from_bytes(content)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put the name of the kernel that is being loaded before the message of an error."""
    try:
        yield
    except ResolutionError as error:
        # The cause stays that of the loader, such as the SyntaxError of a kernel: callers look at `__cause__`.
        raise type(error)(f"{place}: {error}") from error.__cause__ or error
    except OSError as error:
        raise LoadError(f"{place}: {type(error).__name__}: {error}. Check the disk and its permissions") from error


# --- Inside --------------------------------------------------------------------------------------


def _select(resolved: ResolvedKernel) -> str:
    """Select a build: the one that all ranks of a job have whose devices are alike, else the one that fits best."""
    from .client.board import ask_once, find_board

    request = resolved.request
    name = select_variant(resolved.variants, request.backend, request.on_cpu)
    if find_board() is None:
        return name
    on_gpu = (
        not request.on_cpu and cast("Any", torch.cuda).is_initialized()
    )  # a driver that sleeps is not started for this
    device = device_capability(torch.device("cuda")) if on_gpu else "cpu" if request.on_cpu else request.backend
    wanted = str(ask_once(f"the build of {resolved.pin.commit} for {device}", lambda: name))
    choice = choose_here(resolved.variants, request.backend, request.on_cpu)
    if wanted != name and wanted not in map(str, choice.accepted):
        why = next((reason for other, reason in choice.rejected if str(other) == wanted), "it is not listed")
        raise AbsentError(
            f"other ranks have its build {wanted}, and that does not fit here: {why}. Make the ranks alike, with the "
            "same PyTorch"
        )
    return wanted


def _suggestion(resolved: ResolvedKernel) -> str:
    """Name the newest version that has a build for this machine, if the Hub lists one."""
    request = resolved.request
    client = _client(request)
    if client.silence:
        return ""
    try:
        versions = client.list_versions(resolved.pin.repo_id)
        for version in sorted(versions.keys() - {request.version}, reverse=True)[:_MOST_VERSIONS]:
            names, _ = client.list_files(replace(resolved.pin, commit=versions[version]))
            if choose_here(names, request.backend, request.on_cpu).accepted:
                return f". Version {version} has one that fits: version={version}"
    except LoadError as error:  # the first error is the answer; this one is only a note in it
        return f". Whether another version has one could not be asked: {error}"
    return ""


def _client(request: KernelRequest) -> Any:
    from .client.board import find_board, hub_is_silent, leader_patience
    from .client.download import Client, describe_agent

    client = Client(describe_agent(cast("str | None", request.user_agent)), request.local_files_only)
    if find_board() is None:
        return client
    # A pin may take two requests: the other ranks wait for both.
    silent, patience = hub_is_silent(), min(client.patience, leader_patience() / 3)
    return replace(client, persistent=not silent, patience=patience / 6 if silent else patience)


def _install(request: KernelRequest, path: tuple[str, ...], memo: dict[KernelRequest, FetchedBuild]) -> FetchedBuild:
    """Install a kernel that was reached on a path of kernels, each of which depends on the next."""
    name = str(request)
    if name in path:
        circle = " -> ".join((*path[path.index(name) :], name))
        raise UnknownError(f"kernels depend on each other in a circle: {circle}. Tell their publishers")
    if request not in memo:
        # A lock promises a commit: a folder in place of the repository has other files.
        folder = None if request.lock or request.commit else find_override(request.repo_id)
        if folder is None:
            own = fetch_build(select_build(request))
        else:
            asked = f"{request.repo_id} ({VARIABLE}): {folder}"
            own = _read_folder(folder, request, asked, f"local files: {VARIABLE}")
        # After its dependencies: a circle is found on the path, not in the memo.
        memo[request] = _with_dependencies(own, request, (*path, name), memo)
    return memo[request]


def _with_dependencies(
    own: FetchedBuild, options: RequestOptions, path: tuple[str, ...], memo: dict[KernelRequest, FetchedBuild]
) -> FetchedBuild:
    with naming(own.selected.place):
        wanted = own.build.metadata.kernel_depends
        dependencies = {one.repo_id: _install(options.for_dependency(one), path, memo) for one in wanted}
    return replace(own, dependencies=dependencies)


def _read_folder(path: Path, options: RequestOptions, asked: str, trust: str = "local files") -> FetchedBuild:
    with naming(asked):
        folder = local_variant(path, options.backend, options.on_cpu)
    selected = SelectedBuild(folder.name, folder, None, asked)
    with naming(selected.place):
        authorize(folder, PLUGIN)
        build = as_build(folder, read_files(folder))
        digest = check_digest(build)
        signature = check_signature(build, options.repo_id if isinstance(options, KernelRequest) else "", asked)
        return FetchedBuild(selected, build, {"digest": digest, **signature, "trust": trust})


def _check_lock(request: KernelRequest, name: str, resolved: ResolvedKernel) -> dict[str, str]:
    """Refuse a build that a lock does not have, or has with other files; else describe the check."""
    if request.lock is None:
        return {}
    where = request.lock.origin
    if not request.locked:
        return {"lock": f"the commit is that in {where}; its files are not checked: the lock has no hashes"}
    promised = dict(request.locked)
    if name not in promised:
        again = request.lock.again
        raise IntegrityError(f"{where} knows no variant {name}. {again[0].upper()}{again[1:]}")
    actual = hash_variant(resolved.variants[name])
    if actual != promised[name]:
        raise IntegrityError(
            f"its variant {name} is not the one that was locked: {where} says {promised[name]}, and it is {actual}. Do "
            f"not use this kernel; if the publisher can explain it, {request.lock.again}"
        )
    return {"lock": f"commit and files are those in {where}"}


def _read(selected: SelectedBuild, resolved: ResolvedKernel, client: Any) -> tuple[Build, str]:
    """Return a build as listed by the Hub, downloaded if it is not in the cache, and the check that it passed."""
    from .client.answers import share
    from .client.download import metadata_cache

    folder, listed, pin = selected.folder, resolved.variants[selected.variant], resolved.pin

    def here() -> set[str]:  # not the folder: a download that was cut off leaves one
        return {file.path for file in listed if (folder / file.path).is_file()}

    found = here()
    # Of a locked build that was never downloaded, the metadata may be here; of one that was, no file may be missing.
    locked = resolved.request.commit is not None
    if len(found) < len(listed) and not (locked and client.silence and found - {METADATA}):
        # One process of a cache downloads. The lock is a file in the cache: so those wait for it that share the cache,
        # wherever they run, and no rank has to know which ones these are.
        share(
            f"build {selected.variant} at {pin.commit}",
            metadata_cache(pin.repo_id),
            lambda: client.fetch_folder(pin, f"build/{selected.variant}", listed),
            patience=_LONGEST_DOWNLOAD,
            is_done=lambda: len(here()) == len(listed),
        )
    files = read_files(folder)
    transfer = _check_transfer(folder, files, listed)
    return as_build(folder, files), transfer


def _check_transfer(place: Path, files: Mapping[str, bytes], listed: Iterable[RemoteFile]) -> str:
    """Compare files with the listing; remove them from the cache where they differ."""
    from .client.files import discard

    try:
        return check_transfer(files, listed)
    except IntegrityError as error:
        raise IntegrityError(f"{error}. {discard(place)}") from error
