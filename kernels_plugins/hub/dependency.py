"""A kernel that a project, or another kernel, depends on."""

from __future__ import annotations

from dataclasses import dataclass


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
