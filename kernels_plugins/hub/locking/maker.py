"""Makes locks: asks the Hub for the commit of each kernel, and of the kernels that these depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kernels_core import ArgumentError, LoadError

from ..builds.metadata import METADATA
from ..builds.variants import parse_variant
from ..dependency import Dependency
from ..fetching import ResolvedKernel, read_metadata, resolve_kernel
from ..request import KernelRequest
from .lockfile import Lock, LockedKernel, hash_variant

Report = Callable[[Dependency, int, int], None]
"""Called as locking proceeds: with a kernel, how many of its variants were read, and how many there are."""


def make_lock(wanted: Iterable[Dependency], *, trust: Iterable[str] = (), report: Report | None = None) -> Lock:
    """Lock kernels, and all that they depend on in any of their build variants."""
    maker = _LockMaker(tuple(trust), report or (lambda dependency, done, total: None))
    own = sorted(wanted, key=lambda dependency: dependency.order)
    for dependency in own:
        maker.lock(dependency, ())
    others = sorted(maker.locked.keys() - set(own), key=lambda dependency: dependency.order)
    return Lock(tuple(maker.locked[dependency] for dependency in (*own, *others)))


@dataclass(frozen=True)
class _LockMaker:
    trust: tuple[str, ...]
    report: Report
    locked: dict[Dependency, LockedKernel] = field(default_factory=dict)

    def lock(self, wanted: Dependency, path: tuple[Dependency, ...]) -> None:
        """Lock a kernel that was reached on a path of kernels, each of which depends on the next."""
        if wanted in path:
            circle = " -> ".join(map(str, (*path[path.index(wanted) :], wanted)))
            raise ArgumentError(
                f"Kernels depend on each other in a circle: {circle}. Take another version of one of them, or tell its "
                "publisher."
            )
        if wanted in self.locked:
            return
        self.report(wanted, 0, 1)
        resolved = self._resolve(wanted)
        for dependency in sorted(self._dependencies(wanted, resolved), key=lambda dependency: dependency.order):
            self.lock(dependency, (*path, wanted))
        hashes = {variant: hash_variant(files) for variant, files in resolved.variants.items()}
        self.locked[wanted] = LockedKernel(wanted, resolved.pin.commit, tuple(sorted(hashes.items())))

    def _resolve(self, wanted: Dependency) -> ResolvedKernel:
        request = KernelRequest(
            wanted.repo_id, version=wanted.version, revision=wanted.revision, trust_remote_code=self.trust
        )
        resolved = resolve_kernel(request)
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

    def _dependencies(self, wanted: Dependency, resolved: ResolvedKernel) -> set[Dependency]:
        """Return the dependencies of all builds of a kernel; folders without metadata cannot be loaded."""
        builds = [
            name
            for name, files in resolved.variants.items()
            if parse_variant(name) is not None and METADATA in {file.path for file in files}
        ]
        dependencies: set[Dependency] = set()
        with ThreadPoolExecutor(8) as pool:
            for done, metadata in enumerate(pool.map(lambda name: read_metadata(resolved, name), builds), 1):
                self.report(wanted, done, len(builds))
                dependencies |= set(metadata.kernel_depends)
        self.report(wanted, len(builds) or 1, len(builds) or 1)
        return dependencies
