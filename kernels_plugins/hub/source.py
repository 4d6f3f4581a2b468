"""Repositories as plain frozen values: naming one costs nothing, loading it happens on the first call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernels_core import ArgumentError, ArgumentTypeError, KernelLayer


@dataclass(frozen=True)
class LayerRepository:
    """A layer in a kernel repository on the Hub.

    Args:
        repo_id: `owner/name` of the repository.
        layer_name: Name of the layer class or function in the kernel's `layers`.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or one is malformed.
        ArgumentTypeError: If an argument has the wrong type.

    Example:
        >>> LayerRepository("kernels-community/activation", layer_name="SiluAndMul", version=1)
        LayerRepository('kernels-community/activation', layer_name='SiluAndMul', version=1)
    """

    repo_id: str
    layer_name: str = field(kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what names no repository."""
        _expect(self.repo_id, str, "repo_id")
        _expect(self.layer_name, str, "layer_name")
        owner, slash, name = self.repo_id.partition("/")
        if not (owner and slash and name) or "/" in name:
            raise ArgumentError(f"repo_id is {self.repo_id!r}: write 'owner/name'.")
        if (self.revision is None) == (self.version is None):
            raise ArgumentError(
                f"Repository {self.repo_id!r} needs exactly one of revision='<branch, tag or commit>' and "
                f"version=<number>, got revision={self.revision!r} and version={self.version!r}."
            )
        if self.revision is not None:
            _expect(self.revision, str, "revision")
            if not self.revision:
                raise ArgumentError("revision is '': name a branch, tag or commit.")
        elif isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 0:
            raise ArgumentError(f"version is {self.version!r}: kernel versions are whole numbers such as 1.")
        trusted = self.trust_remote_code
        if not isinstance(trusted, bool):
            listed = isinstance(trusted, list | tuple | set | frozenset)
            if not listed or not all(isinstance(repo_id, str) for repo_id in trusted):
                raise ArgumentTypeError(f"trust_remote_code is True, False or a list of 'owner/name', not {trusted!r}.")
            object.__setattr__(self, "trust_remote_code", tuple(trusted))  # a list would not hash

    @property
    def wanted(self) -> str:
        """The revision as the Hub knows it."""
        return f"v{self.version}" if self.revision is None else self.revision

    def trusts(self, repo_id: str) -> bool:
        """Whether the user allows code of this repository to run, whoever published it."""
        return self.trust_remote_code is True or (
            isinstance(self.trust_remote_code, tuple) and repo_id in self.trust_remote_code
        )

    def load(self) -> KernelLayer:
        """Fetch, check and import the layer; raises what the dispatcher would give as the reason."""
        from .plugin import load_repository

        return load_repository(self).layer

    def __repr__(self) -> str:
        """Show what was said; never asks the Hub."""
        said = f"revision={self.revision!r}" if self.version is None else f"version={self.version}"
        trust = f", trust_remote_code={self.trust_remote_code!r}" if self.trust_remote_code else ""
        return f"LayerRepository({self.repo_id!r}, layer_name={self.layer_name!r}, {said}{trust})"


@dataclass(frozen=True)
class LocalLayerRepository:
    """A layer in a kernel repository on disk: a folder with `build/`, with variants, or one variant itself.

    Code that the user points to is trusted; its digest is checked where it has one.

    Args:
        repo_path: The folder.
        layer_name: Name of the layer class or function in the kernel's `layers`.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.

    Example:
        >>> LocalLayerRepository("kernels/activation", layer_name="SiluAndMul")
        LocalLayerRepository('kernels/activation', layer_name='SiluAndMul')
    """

    repo_path: str | Path
    layer_name: str = field(kw_only=True)

    def __post_init__(self) -> None:
        """Turn the path into a `Path`."""
        if not isinstance(self.repo_path, str | Path):
            raise ArgumentTypeError(f"repo_path is a path, not {self.repo_path!r}.")
        _expect(self.layer_name, str, "layer_name")
        object.__setattr__(self, "repo_path", Path(self.repo_path))

    @property
    def path(self) -> Path:
        """The folder as a `Path`."""
        return Path(self.repo_path)

    def load(self) -> KernelLayer:
        """Check and import the layer; raises what the dispatcher would give as the reason."""
        from .plugin import load_local

        return load_local(self).layer

    def __repr__(self) -> str:
        """Show what was said."""
        return f"LocalLayerRepository({str(self.repo_path)!r}, layer_name={self.layer_name!r})"


def _expect(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name} is a {kind.__name__}, not {value!r}.")
