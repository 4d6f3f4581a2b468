"""Kernels by name: the functions that programs call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from .builds.metadata import METADATA, Metadata
from .builds.requirements import check_device
from .builds.variants import VariantAccepted, VariantRejected, choose_variants, parse_variant
from .client.overrides import find_override
from .errors import AbsentError, UnsuitableError
from .kernel import (
    LoadedKernel,
    find,
    install,
    load,
    load_folder,
    loaded_kernels,
    local_builds,
    local_variant,
    locate,
    machine,
    read_metadata,
)
from .request import KernelRequest


def get_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    user_agent: str | Mapping[str, str] | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    check_arch: bool = True,
) -> ModuleType:
    """Load a kernel from the Hub, or from the cache, and return its module.

    Args:
        repo_id: `owner/name` of the repository.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        user_agent: What to tell the Hub about the caller in each request, a text or a mapping.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may. It counts for dependencies, too.
        check_arch: Whether a build without code for the current device is refused.

    Returns:
        The module. It is the same for all that ask for the same commit.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: If it cannot be loaded; names repository, commit, variant and what to do.

    Example:
        >>> get_kernel("acme/silu")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Repository 'acme/silu' needs exactly one of revision='<branch, tag or ...
    """
    request = KernelRequest(
        repo_id,
        revision=revision,
        version=version,
        backend=backend,
        user_agent=user_agent,
        trust_remote_code=trust_remote_code,
        check_arch=check_arch,
    )
    machine(backend)
    return load(request).module


def get_local_kernel(
    repo_path: str | Path,
    *,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    user_agent: str | Mapping[str, str] | None = None,
) -> ModuleType:
    """Load a kernel from a folder on disk; kernels that it depends on come from the Hub.

    Args:
        repo_path: A folder with `build/`, with builds, or a build itself.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        trust_remote_code: Whether code of other publishers than the trusted ones may run, as for
            `get_kernel`; for the dependencies. What lies in the folder is trusted.
        user_agent: What to tell the Hub about the caller in each request, a text or a mapping.

    Returns:
        The module.

    Raises:
        ArgumentError: If an argument is malformed.
        ResolutionError: If it cannot be loaded; names folder, variant and what to do.

    Example:
        >>> get_local_kernel("nowhere")
        Traceback (most recent call last):
        ...
        kernels_plugins.hub.errors.AbsentError: nowhere: there is no such folder: check the path
    """
    # What is malformed is refused as it would be in a request.
    checked = KernelRequest("local/kernel", version=0, trust_remote_code=trust_remote_code, user_agent=user_agent)
    machine(backend)
    terms = replace(checked.terms, backend=backend, check_arch=False)
    return load_folder(Path(repo_path), terms).module


def has_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    check_arch: bool = True,
) -> bool:
    """Say whether there is a build of a kernel, and of all that it depends on, for this machine.

    Downloads metadata at most. That a repository cannot be asked for, is not trusted, or does not have the version
    is an error, and no answer.

    Args:
        repo_id: `owner/name` of the repository.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        trust_remote_code: As for `get_kernel`.
        check_arch: Whether a build without code for the current device counts as none.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: If that cannot be found out; a network error says so, and is a `ConnectionError`.

    Example:
        >>> has_kernel("acme/silu")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Repository 'acme/silu' needs exactly one of revision='<branch, tag or ...
    """
    request = KernelRequest(
        repo_id,
        revision=revision,
        version=version,
        backend=backend,
        trust_remote_code=trust_remote_code,
        check_arch=check_arch,
    )
    machine(backend)
    try:
        for metadata in _described(request, ()):
            if check_arch:
                check_device(metadata)
    except (AbsentError, UnsuitableError):
        return False
    return True


def _described(request: KernelRequest, seen: tuple[KernelRequest, ...]) -> Iterator[Metadata]:
    """Yield the metadata of what would be loaded."""
    folder = find_override(request.repo_id)
    if folder is None:
        location = locate(request, suggest=False)
        assert location.found is not None
        metadata = read_metadata(location.found, location.variant)
    elif not folder.is_dir():
        raise AbsentError(f"{folder}: there is no such folder: check LOCAL_KERNELS")
    else:
        metadata = Metadata.read_from_file(local_variant(folder, request.terms) / METADATA)
    yield metadata
    for dependency in metadata.kernel_depends:
        needed = request.terms.ask(dependency)
        if needed not in (*seen, request):  # a circle is for loading to tell
            yield from _described(needed, (*seen, request))


def install_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    local_files_only: bool = False,
    user_agent: str | Mapping[str, str] | None = None,
    trust_remote_code: bool | Sequence[str] = False,
) -> Path:
    """Download the build of a kernel for this machine, and of all that it depends on, and check them; run nothing.

    Args:
        repo_id: `owner/name` of the repository.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        local_files_only: Whether to ask nothing of the Hub: it must be in the cache then.
        user_agent: What to tell the Hub about the caller in each request, a text or a mapping.
        trust_remote_code: As for `get_kernel`.

    Returns:
        The folder of the build.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: If it cannot be had; names repository, commit, variant and what to do.

    Example:
        >>> install_kernel("acme/silu")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Repository 'acme/silu' needs exactly one of revision='<branch, tag or ...
    """
    request = KernelRequest(
        repo_id,
        revision=revision,
        version=version,
        backend=backend,
        user_agent=user_agent,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
    )
    machine(backend)
    return install(request).location.folder


def get_kernel_variants(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
) -> list[VariantAccepted | VariantRejected]:
    """List the builds of a kernel: which fit this machine, and why the others do not. Downloads nothing.

    Args:
        repo_id: `owner/name` of the repository; whether its publisher is trusted does not matter here.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        backend: `cpu`, or the backend that torch was built for, which is the default.

    Returns:
        Those that fit, the best first, then the others by name. Folders that are no builds are left out.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: If that cannot be found out.

    Example:
        >>> get_kernel_variants("acme/silu")
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Repository 'acme/silu' needs exactly one of revision='<branch, tag or ...
    """
    request = KernelRequest(repo_id, revision=revision, version=version, backend=backend, trust_remote_code=True)
    here = machine(backend)
    folder = find_override(repo_id)
    names: Any = find(request).variants if folder is None else [build.name for build in local_builds(folder)]
    choice = choose_variants(names, here)
    rejected = ((parse_variant(name), reason) for name, reason in choice.rejected)
    return [
        *map(VariantAccepted, choice.accepted),
        *(VariantRejected(variant, reason) for variant, reason in rejected if variant is not None),
    ]


def get_loaded_kernels() -> list[LoadedKernel]:
    """Return every kernel that was imported in this process, oldest first, each build once.

    Example:
        >>> {kernel.metadata.name for kernel in get_loaded_kernels()} >= set()
        True
    """
    return loaded_kernels()
