"""Older names, for programs that still use them: a function at the top of a kernel, not in its `layers`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kernels_core import use_kernel_forward_from_hub

from .locking.locked import LockedLayerRepository
from .request import KernelRequest
from .source import KernelSource, LocalLayerRepository


def _deprecate(old: str, new: str, why: str) -> None:
    warnings.warn(f"{old} is deprecated, as in `kernels`: {why} {new}.", DeprecationWarning, stacklevel=4)


@dataclass(frozen=True)
class FuncRepository(KernelSource):
    """A function at the top of a kernel on the Hub. Deprecated: use `LayerRepository`, and name it in `layers`.

    Args:
        repo_id: `owner/name` of the repository.
        func_name: Name of the function.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        trust_remote_code: As for `LayerRepository`.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or one is malformed.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     FuncRepository("acme/silu", func_name="silu", version=1).func_name
        'silu'
    """

    repo_id: str
    func_name: str = field(kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)
    is_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Say that it is deprecated, and refuse what names no repository."""
        _deprecate("FuncRepository", "LayerRepository", "offer the function in the kernel's `layers`, and use")
        object.__setattr__(self, "trust_remote_code", self.kernel_request().trust_remote_code)
        object.__setattr__(self, "layer_name", self.func_name)

    def kernel_request(self) -> KernelRequest:
        """Return which kernel the function is in."""
        return KernelRequest(
            self.repo_id,
            revision=self.revision,
            version=self.version,
            trust_remote_code=self.trust_remote_code,
        )


class LocalFuncRepository(LocalLayerRepository):
    """A function at the top of a kernel on disk. Deprecated: use `LocalLayerRepository`, and name it in `layers`.

    Args:
        repo_path: A folder with `build/`, with builds, or a build itself.
        func_name: Name of the function.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     LocalFuncRepository("kernels/silu", func_name="silu").func_name
        'silu'
    """

    is_function: ClassVar[bool] = True

    def __init__(self, repo_path: str | Path, *, func_name: str) -> None:
        """Say that it is deprecated, and turn the path into a `Path`."""
        _deprecate(
            "LocalFuncRepository", "LocalLayerRepository", "offer the function in the kernel's `layers`, and use"
        )
        super().__init__(repo_path, layer_name=func_name)

    @property
    def func_name(self) -> str:
        """Name of the function."""
        return self.layer_name

    def __repr__(self) -> str:
        """Show what was said."""
        return f"LocalFuncRepository({str(self.repo_path)!r}, func_name={self.layer_name!r})"


class LockedFuncRepository(LockedLayerRepository):
    """A function at the top of a locked kernel. Deprecated: use `LockedLayerRepository`, and name it in `layers`.

    Args:
        repo_id: `owner/name` of the repository.
        lockfile: The `kernels.lock`. By default, that of the package whose code makes this.
        func_name: Name of the function.
        trust_remote_code: As for `LockedLayerRepository`.

    Raises:
        ArgumentError: If there is no lock, it is malformed, or the kernel is not in it.

    Example:
        >>> LockedFuncRepository.__base__.__name__
        'LockedLayerRepository'
    """

    is_function: ClassVar[bool] = True

    def __init__(
        self,
        repo_id: str,
        *,
        lockfile: str | Path | None = None,
        func_name: str,
        trust_remote_code: bool | Sequence[str] = False,
    ) -> None:
        """Say that it is deprecated, and read the lock."""
        why = "offer the function in the kernel's `layers`, and use"
        _deprecate("LockedFuncRepository", "LockedLayerRepository", why)
        super().__init__(repo_id, lockfile=lockfile, layer_name=func_name, trust_remote_code=trust_remote_code)

    @property
    def func_name(self) -> str:
        """Name of the function."""
        return self.layer_name

    def __repr__(self) -> str:
        """Show what was said; asks nobody."""
        return super().__repr__().replace("LockedLayer", "LockedFunc", 1).replace("layer_name=", "func_name=", 1)


def use_kernel_func_from_hub(func_name: str) -> Callable[[Any], Any]:
    """Mark a function for dispatch. Deprecated: use `use_kernel_forward_from_hub`, which does the same.

    Args:
        func_name: The layer name.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     double = use_kernel_func_from_hub("double")(lambda x: x * 2)
        >>> double(3)
        6
    """
    _deprecate("use_kernel_func_from_hub", "use_kernel_forward_from_hub", "use")
    return use_kernel_forward_from_hub(func_name)
