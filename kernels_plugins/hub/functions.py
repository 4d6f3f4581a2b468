"""Kernels by name: the functions that programs call.

Their arguments have the names of those of `KernelRequest`, which checks them: so it takes `locals()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels_core import require_type, set_module

from .builds.machine import this_machine
from .builds.metadata import METADATA, Metadata
from .builds.requirements import check_device
from .builds.selection import choose_here, local_builds, local_variant
from .builds.variants import VariantAccepted, VariantRejected, parse_variant
from .client.overrides import VARIABLE, find_override
from .errors import AbsentError, UnsuitableError
from .fetching import install, naming, read_metadata, resolve_kernel, select_build
from .kernel import load, load_folder
from .request import KernelRequest, RequestOptions


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
        user_agent: Information about the caller for each request to the Hub, a text or a mapping.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may. It applies to dependencies, too.
        check_arch: Whether a build without code for the current device is refused.

    Returns:
        The module. It is the same for all callers that request the same commit.

    Raises:
        ArgumentError: Not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: It cannot be loaded; names repository, commit, variant and what to do.

    Example:
        >>> silu = get_kernel("acme/silu", version=1)
        >>> silu.layers.Silu()(torch.zeros(2))
        tensor([0., 0.])
        >>> get_kernel("acme/silu", version=9)
        Traceback (most recent call last):
        ...
        kernels_plugins.hub.errors.RevisionError: acme/silu at v9: it has no version 9: versions that exist are 1
    """
    request = KernelRequest(**locals())
    this_machine(backend)
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
        repo_path: A folder with `build/`, with builds, or a build itself. Its code is trusted.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        trust_remote_code: As for `get_kernel`, for the dependencies.
        user_agent: As for `get_kernel`.

    Returns:
        The module.

    Raises:
        ArgumentError: An argument is malformed.
        ResolutionError: It cannot be loaded; names folder, variant and what to do.

    Example:
        >>> folder = install_kernel("acme/silu", version=1)
        >>> get_local_kernel(folder).layers.Silu()(torch.zeros(2))
        tensor([0., 0.])
    """
    options = RequestOptions(
        backend=backend, trust_remote_code=trust_remote_code, user_agent=user_agent, check_arch=False
    )
    require_type(repo_path, (str, Path), "repo_path")
    this_machine(backend)
    return load_folder(Path(repo_path), options).module


def has_kernel(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    trust_remote_code: bool | Sequence[str] = False,
    check_arch: bool = True,
) -> bool:
    """Return whether there is a build of a kernel, and of all that it depends on, for this machine.

    Downloads only metadata. A repository that cannot be reached or is not trusted, and a version that does not exist,
    is an error, not False. The arguments are those of `get_kernel`.

    Raises:
        ArgumentError: Not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: The Hub has no answer; a network error says so, and is a `ConnectionError`.

    Example:
        >>> has_kernel("acme/silu", version=1)
        True
    """
    request = KernelRequest(**locals())
    this_machine(backend)
    try:
        for metadata in _metadata(request, ()):
            if check_arch:
                check_device(metadata)
    except (AbsentError, UnsuitableError):
        return False
    return True


def _metadata(request: KernelRequest, passed: tuple[KernelRequest, ...]) -> Iterator[Metadata]:
    """Yield the metadata of the builds that would be loaded."""
    folder = find_override(request.repo_id)
    if folder is None:
        selected = select_build(request, suggest=False)
        assert selected.resolved is not None
        metadata = read_metadata(selected.resolved, selected.variant)
    else:
        with naming(f"{request.repo_id} ({VARIABLE}): {folder}"):
            metadata = Metadata.read_from_file(local_variant(folder, request.backend, request.on_cpu) / METADATA)
    yield metadata
    for dependency in metadata.kernel_depends:
        needed = request.for_dependency(dependency)
        if needed not in (*passed, request):  # loading refuses a circle, and names it
            yield from _metadata(needed, (*passed, request))


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

    The arguments are those of `get_kernel`; with `local_files_only`, no request is sent to the Hub: the kernel must be
    in the cache then.

    Returns:
        The folder of the build.

    Raises:
        ArgumentError: Not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: It cannot be installed; names repository, commit, variant and what to do.

    Example:
        >>> sorted(path.name for path in install_kernel("acme/silu", version=1).iterdir())
        ['__init__.py', 'layers.py', 'metadata.json']
    """
    request = KernelRequest(**locals())
    this_machine(backend)
    return install(request).selected.folder


def get_kernel_variants(
    repo_id: str,
    *,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
) -> list[VariantAccepted | VariantRejected]:
    """List the builds of a kernel: which fit this machine, and why the others do not. Downloads nothing.

    The arguments are those of `get_kernel`. The publisher need not be trusted.

    Returns:
        Those that fit, the best first, then the others by name. Folders that are no builds are left out.

    Raises:
        ArgumentError: Not exactly one of revision and version is given, or an argument is malformed.
        ResolutionError: The Hub has no answer.

    Example:
        >>> (decision,) = get_kernel_variants("acme/silu", version=1)
        >>> decision.variant.variant_str
        'torch-universal'
    """
    request = KernelRequest(**locals(), trust_remote_code=True)
    this_machine(backend)
    folder = find_override(repo_id)
    names: Any = resolve_kernel(request).variants if folder is None else [build.name for build in local_builds(folder)]
    choice = choose_here(names, backend)
    rejected = ((parse_variant(name), reason) for name, reason in choice.rejected)
    return [
        *map(VariantAccepted, choice.accepted),
        *(VariantRejected(variant, reason) for variant, reason in rejected if variant is not None),
    ]


set_module("kernels_plugins", globals())
