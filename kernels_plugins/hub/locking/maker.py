"""Makes locks: asks the Hub which commit each kernel is now, and which kernels those depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kernels_core import ArgumentError, LoadError

from ..builds.metadata import METADATA
from ..builds.variants import parse_variant
from ..dependency import Dependency
from ..kernel import Found, find, read_metadata
from ..request import KernelRequest
from .lockfile import Lock, LockedKernel, hash_variant

Tell = Callable[[Dependency, int, int], None]
"""Is told of what is locked: how many of its variants were read, and how many there are."""


def make_lock(wanted: Iterable[Dependency], *, trust: Iterable[str] = (), tell: Tell | None = None) -> Lock:
    """Lock kernels, and all that they depend on in any of their build variants.

    Args:
        wanted: The kernels that a project depends on.
        trust: Repositories to lock though the Hub does not list their publishers as trusted.
        tell: Is told how far it is.

    Returns:
        The lock: first what was wanted, then what that depends on.

    Raises:
        ArgumentError: If kernels depend on each other in a circle; names it.
        ResolutionError: If one does not exist, is not trusted, or the Hub cannot be asked; names it and what to do.
    """
    smith = _Locksmith(tuple(trust), tell or (lambda dependency, done, total: None))
    own = sorted(wanted, key=lambda dependency: dependency.order)
    for dependency in own:
        smith.lock(dependency, ())
    others = sorted(smith.locked.keys() - set(own), key=lambda dependency: dependency.order)
    return Lock(tuple(smith.locked[dependency] for dependency in (*own, *others)))


@dataclass(frozen=True)
class _Locksmith:
    trust: tuple[str, ...]
    tell: Tell
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
        self.tell(wanted, 0, 1)
        found = self._find(wanted)
        for dependency in sorted(self._dependencies(wanted, found), key=lambda dependency: dependency.order):
            self.lock(dependency, (*path, wanted))
        hashes = {variant: hash_variant(files) for variant, files in found.variants.items()}
        self.locked[wanted] = LockedKernel(wanted, found.pin.commit, tuple(sorted(hashes.items())))

    def _find(self, wanted: Dependency) -> Found:
        request = KernelRequest(
            wanted.repo_id, version=wanted.version, revision=wanted.revision, trust_remote_code=self.trust
        )
        found = find(request)
        if found.first is not None and found.first != found.pin:
            raise ArgumentError(
                f"{wanted} is redirected to {found.checked['redirect']}, and may be redirected anew: name that "
                "instead, or tell the publisher of the kernel that depends on it."
            )
        how = found.checked["revision"]
        if how.startswith("from the cache"):
            raise LoadError(
                f"{request}: a lock says what the Hub has now, and it was not asked ({how}). Lock where there is a "
                "network"
            )
        return found

    def _dependencies(self, wanted: Dependency, found: Found) -> set[Dependency]:
        """Return what any build of a kernel depends on."""
        builds = [name for name, files in found.variants.items() if _is_described(name, {file.path for file in files})]
        dependencies: set[Dependency] = set()
        with ThreadPoolExecutor(8) as pool:
            described = pool.map(lambda name: read_metadata(found, name), builds)
            for done, metadata in enumerate(described, 1):
                self.tell(wanted, done, len(builds))
                dependencies |= set(metadata.kernel_depends)
        self.tell(wanted, len(builds) or 1, len(builds) or 1)
        return dependencies


def _is_described(name: str, files: set[str]) -> bool:
    """Whether a folder is a build that says what it depends on; nothing else can be loaded."""
    return parse_variant(name) is not None and METADATA in files
