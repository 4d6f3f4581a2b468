"""Layers in repositories, as plain frozen values: naming one costs nothing, loading it happens on the first call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from kernels_core import ArgumentTypeError, KernelLayer

from .request import KernelRequest


class KernelSource:
    """A layer of a kernel on the Hub: what the plugin `hub` loads."""

    layer_name: str
    is_function: ClassVar[bool] = False
    """Whether it is a function at the top of the kernel, and no member of its `layers`."""

    def kernel_request(self) -> KernelRequest:
        """Return which kernel the layer is in."""
        raise NotImplementedError

    @property
    def wanted(self) -> str:
        """The revision as the Hub knows it; that of a locked kernel is its commit."""
        return self.kernel_request().wanted

    def trusts(self, repo_id: str) -> bool:
        """Whether the user allows code of this repository to run, whoever published it."""
        return self.kernel_request().trusts(repo_id)

    def load(self) -> KernelLayer:
        """Fetch, check and import the layer; raises what the dispatcher would give as the reason."""
        from .plugin import load_source

        return load_source(self).layer


@dataclass(frozen=True)
class LayerRepository(KernelSource):
    """A layer in a kernel repository on the Hub.

    Args:
        repo_id: `owner/name` of the repository.
        layer_name: Name of the layer class or function in the kernel's `layers`.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may.
        user_agent: What to tell the Hub about the caller in each request, a text or a mapping.

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
    user_agent: str | Mapping[str, str] | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        """Refuse what names no repository, and turn what would not hash into what does."""
        _expect(self.layer_name, str, "layer_name")
        request = self.kernel_request()
        object.__setattr__(self, "trust_remote_code", request.trust_remote_code)
        object.__setattr__(self, "user_agent", request.user_agent)

    def kernel_request(self) -> KernelRequest:
        """Return which kernel the layer is in."""
        return KernelRequest(
            self.repo_id,
            revision=self.revision,
            version=self.version,
            trust_remote_code=self.trust_remote_code,
            user_agent=self.user_agent,
        )

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
    is_function: ClassVar[bool] = False

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
