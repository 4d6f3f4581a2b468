"""Kernels that a project, or another kernel, depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

from .errors import DependencyError


@dataclass(frozen=True)
class Dependency:
    """A kernel that is asked for.

    Attributes:
        repo_id: `owner/name` of the repository.
        version: Number of the version, if that is asked for.
        revision: Branch, tag or commit, if that is asked for. In a lock of the older form, neither is said.

    Example:
        >>> print(Dependency("acme/silu", version=1))
        acme/silu version 1
    """

    repo_id: str
    version: int | None = None
    revision: str | None = None

    @property
    def wanted(self) -> str | None:
        """The revision as the Hub knows it."""
        return self.revision if self.version is None else f"v{self.version}"

    @property
    def order(self) -> tuple[str, bool, int, str]:
        """Where it stands in a file: by name, versions before revisions."""
        return self.repo_id, self.version is None, self.version or 0, self.revision or ""

    def __str__(self) -> str:
        """Name repository, and version or revision."""
        said = f" version {self.version}" if self.version is not None else f" at {self.revision}" * bool(self.revision)
        return f"{self.repo_id}{said}"


_lent: ContextVar[Mapping[str, ModuleType] | None] = ContextVar("kernels_plugins.hub.dependency", default=None)


@contextmanager
def lend_kernels(kernels: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let `get_kernel_dep` give these, while a kernel that depends on them is imported."""
    token = _lent.set(kernels)
    try:
        yield
    finally:
        _lent.reset(token)


def is_lending() -> bool:
    """Whether a kernel is being imported here."""
    return _lent.get() is not None


def get_kernel_dep(repo_id: str) -> ModuleType:
    """Return a kernel that this kernel depends on; called by a kernel, while it is imported.

    Which version it is, the metadata of the calling kernel says, under `kernel-depends`.

    Args:
        repo_id: The name of its repository, as in the metadata.

    Raises:
        LoadError: If no kernel is being imported, or it does not depend on that one. It is a `RuntimeError`, too.

    Example:
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
