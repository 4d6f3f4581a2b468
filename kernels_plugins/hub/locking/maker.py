"""Makes locks: asks the Hub for the commit of each kernel, and of the kernels that these depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from typing import Any

from kernels_core import ArgumentError, LoadError

from ..builds.metadata import METADATA
from ..builds.variants import parse_variant
from ..dependency import Dependency
from ..fetching import ResolvedKernel, read_metadata, resolve_kernel
from ..request import KernelRequest
from .lockfile import NOTHING, Lock, LockedKernel, hash_variant

Report = Callable[[Dependency, int, int], None]
"""Called as locking proceeds: with a kernel, how many of its variants were read, and how many there are."""

_ORDER = attrgetter("order")


def make_lock(
    wanted: Iterable[Dependency], *, kept: Lock = NOTHING, trust: Iterable[str] = (), report: Report | None = None
) -> Lock:
    """Lock the kernels of a project, and after them all that they depend on in any of their build variants.

    Those in `kept` stay at their commit, and each other gets the newest one. Repositories in `trust` are locked though
    the Hub does not list their publishers as trusted.
    """
    allowed = tuple(trust)
    commits = {kernel.dependency: kernel.commit for kernel in kept.kernels}
    locked: dict[Dependency, LockedKernel] = {}

    def lock(kernel: Dependency, path: tuple[Dependency, ...] = ()) -> None:
        """Lock a kernel that was reached on a path of kernels, each of which depends on the next."""
        if kernel in path:
            circle = " -> ".join(map(str, (*path[path.index(kernel) :], kernel)))
            raise ArgumentError(
                f"Kernels depend on each other in a circle: {circle}. Take another version of one of them, or tell its "
                "publisher."
            )
        if kernel in locked:
            return
        show: Callable[[int, int], None] = partial(report, kernel) if report else lambda done, total: None
        show(0, 1)
        resolved = _resolve(kernel, allowed, commits.get(kernel))
        for dependency in sorted(_dependencies(resolved, show), key=_ORDER):
            lock(dependency, (*path, kernel))
        hashes = {variant: hash_variant(files) for variant, files in resolved.variants.items()}
        locked[kernel] = LockedKernel(kernel, resolved.pin.commit, tuple(sorted(hashes.items())))

    own = sorted(wanted, key=_ORDER)
    for dependency in own:
        lock(dependency)
    return Lock(tuple(locked[kernel] for kernel in (*own, *sorted(locked.keys() - set(own), key=_ORDER))))


def _resolve(wanted: Dependency, trust: tuple[str, ...], commit: str | None) -> ResolvedKernel:
    """Find the commit of a kernel, and its builds; or its builds at a commit."""
    place: Any = {"revision": commit} if commit else {"version": wanted.version, "revision": wanted.revision}
    request = KernelRequest(wanted.repo_id, **place, trust_remote_code=trust)
    resolved = resolve_kernel(request)
    if commit:
        return resolved
    if resolved.first != resolved.pin:
        raise ArgumentError(
            f"{wanted} is redirected to {resolved.checked['redirect']}, and may be redirected anew: name that "
            "instead, or tell the publisher of the kernel that depends on it."
        )
    how = resolved.checked["revision"]
    if how.startswith("from the cache"):
        raise LoadError(
            f"{request}: a lock has the commits that the Hub has now, and it was not asked ({how}). Lock where "
            "there is a network"
        )
    return resolved


def _dependencies(resolved: ResolvedKernel, show: Callable[[int, int], None]) -> set[Dependency]:
    """Return the dependencies of all builds of a kernel; folders without metadata cannot be loaded."""
    builds = [
        name
        for name, files in resolved.variants.items()
        if parse_variant(name) is not None and METADATA in {file.path for file in files}
    ]
    dependencies: set[Dependency] = set()
    with ThreadPoolExecutor(8) as pool:  # one small file of each build, from the Hub
        for done, metadata in enumerate(pool.map(lambda name: read_metadata(resolved, name), builds), 1):
            show(done, len(builds))
            dependencies |= set(metadata.kernel_depends)
    show(len(builds) or 1, len(builds) or 1)
    return dependencies
