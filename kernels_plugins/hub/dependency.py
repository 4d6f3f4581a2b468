"""Kernels that a project, or another kernel, depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from kernels_core import set_module

from .errors import DependencyError
from .names import is_repo_id, is_revision, is_version


@dataclass(frozen=True)
class Dependency:
    """A kernel that is depended on.

    Example:
        >>> print(Dependency("acme/silu", version=1))
        acme/silu version 1
    """

    repo_id: str  # `owner/name` of the repository
    version: int | None = None  # number of the version, if there is one
    revision: str | None = None  # branch, tag or commit, if there is one. In a lock of the older form, both are None

    @property
    def wanted(self) -> str | None:
        """The revision as the Hub knows it."""
        return self.revision if self.version is None else f"v{self.version}"

    @property
    def order(self) -> tuple[str, bool, int, str]:
        """Where it stands in a file: by name, versions before revisions."""
        return self.repo_id, self.version is None, self.version or 0, self.revision or ""

    def __str__(self) -> str:
        place = f" version {self.version}" if self.version is not None else f" at {self.revision}" * bool(self.revision)
        return f"{self.repo_id}{place}"


def parse_dependency(entry: Any) -> Dependency | str:
    """Read an entry of a lock or of a kernel's metadata; return the problem, where it is malformed.

    Example:
        >>> parse_dependency({"repo-id": "acme/silu", "version": 1})
        Dependency(repo_id='acme/silu', version=1, revision=None)
        >>> parse_dependency({"repo-id": "acme/silu"})
        'it has neither version nor revision'
    """
    known = ("repo-id", "version", "revision")
    if not isinstance(entry, Mapping):
        return f"{entry!r} is no object"
    if unknown := sorted(entry.keys() - set(known)):
        return f"{', '.join(map(repr, unknown))} is not known, {', '.join(sorted(known))} are"
    repo_id, version, revision = map(entry.get, known)
    if not is_repo_id(repo_id):
        return f"its repo-id is {repo_id!r}, not 'owner/name'"
    if (version is None) == (revision is None):
        return "it has neither version nor revision" if version is None else "it has both version and revision"
    if version is not None and not (is_version(version) and version < 2**64):
        return f"its version is {version!r}, not a whole number"
    if revision is not None and not is_revision(revision):
        return f"its revision is {revision!r}, not a branch, tag or commit"
    return Dependency(repo_id, version, revision)


_lent: ContextVar[Mapping[str, ModuleType] | None] = ContextVar("kernels_plugins.hub.dependency", default=None)


@contextmanager
def lend_kernels(kernels: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let `get_kernel_dep` return these, while a kernel that depends on them is imported."""
    token = _lent.set(kernels)
    try:
        yield
    finally:
        _lent.reset(token)


def is_lending() -> bool:
    """Whether a kernel is being imported in this thread or task."""
    return _lent.get() is not None


def get_kernel_dep(repo_id: str) -> ModuleType:
    """Return a kernel that this kernel depends on; called by a kernel, while it is imported.

    The metadata of the calling kernel has its version or revision, under `kernel-depends`.

    Args:
        repo_id: `owner/name` of the repository, as in the metadata.

    Returns:
        The module of the kernel.

    Raises:
        LoadError: No kernel is being imported, or the calling kernel does not declare this dependency. It is a
            `RuntimeError`, too.

    Example:
        The kernel `acme/top` has `from kernels_plugins import get_kernel_dep` and
        `FACTOR = 2 * get_kernel_dep("acme/base").FACTOR` at the top of its module:

        >>> get_kernel("acme/base", version=1).FACTOR, get_kernel("acme/top", version=1).FACTOR
        (3, 6)
        >>> get_kernel_dep("acme/silu")
        Traceback (most recent call last):
        ...
        kernels_plugins.hub.errors.DependencyError: get_kernel_dep('acme/silu') is called where no kernel is being ...
    """
    kernels = _lent.get()
    if kernels is None:
        raise DependencyError(
            f"get_kernel_dep({repo_id!r}) is called where no kernel is being imported: call it at the top of a module "
            "of the kernel, not in a function that runs later. Elsewhere, use get_kernel"
        )
    if repo_id not in kernels:
        there = ", ".join(sorted(kernels)) or "none"
        raise DependencyError(
            f"get_kernel_dep({repo_id!r}): this kernel declares no such dependency. Those under kernel-depends in its "
            f"metadata are: {there}. Its publisher declares them in build.toml"
        )
    return kernels[repo_id]


set_module("kernels_plugins", globals())
