"""Older names of the library `kernels`: a function at the top of a kernel, not in its `layers`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kernels_core import set_module, use_kernel_forward_from_hub

from .locking.locked import LockedLayerRepository
from .source import KernelSource, LayerRepository, LocalLayerRepository


def _deprecate(old: str, new: str, why: str = "offer the function in the kernel's `layers`, and use") -> None:
    warnings.warn(f"{old} is deprecated, as in `kernels`: {why} {new}.", DeprecationWarning, stacklevel=3)


class _Function(KernelSource):
    """A function at the top of a kernel."""

    is_function: ClassVar[bool] = True

    @property
    def func_name(self) -> str:
        """Name of the function."""
        return self.layer_name


class FuncRepository(_Function, LayerRepository):
    """A function at the top of a kernel on the Hub. Deprecated: use `LayerRepository`, and name it in `layers`.

    Arguments and errors are those of `LayerRepository`; `func_name` names the function.

    Example:
        >>> FuncRepository("acme/silu", func_name="silu", version=1)
        FuncRepository('acme/silu', func_name='silu', version=1)
    """

    def __init__(
        self,
        repo_id: str,
        *,
        func_name: str,
        revision: str | None = None,
        version: int | None = None,
        trust_remote_code: bool | Sequence[str] = False,
    ) -> None:
        _deprecate("FuncRepository", "LayerRepository")
        super().__init__(
            repo_id, layer_name=func_name, revision=revision, version=version, trust_remote_code=trust_remote_code
        )


class LocalFuncRepository(_Function, LocalLayerRepository):
    """A function at the top of a kernel on disk. Deprecated: use `LocalLayerRepository`, and name it in `layers`.

    Arguments and errors are those of `LocalLayerRepository`; `func_name` names the function.

    Example:
        >>> LocalFuncRepository("kernels/silu", func_name="silu")
        LocalFuncRepository('kernels/silu', func_name='silu')
    """

    def __init__(self, repo_path: str | Path, *, func_name: str) -> None:
        _deprecate("LocalFuncRepository", "LocalLayerRepository")
        super().__init__(repo_path, layer_name=func_name)


class LockedFuncRepository(_Function, LockedLayerRepository):
    """A function at the top of a locked kernel. Deprecated: use `LockedLayerRepository`, and name it in `layers`.

    Arguments and errors are those of `LockedLayerRepository`; `func_name` names the function.

    Example:
        >>> LockedFuncRepository("acme/silu", func_name="silu", lockfile="kernels.lock").func_name
        'silu'
    """

    def __init__(
        self,
        repo_id: str,
        *,
        lockfile: str | Path | None = None,
        func_name: str,
        trust_remote_code: bool | Sequence[str] = False,
    ) -> None:
        _deprecate("LockedFuncRepository", "LockedLayerRepository")
        super().__init__(repo_id, lockfile=lockfile, layer_name=func_name, trust_remote_code=trust_remote_code)


def use_kernel_func_from_hub(func_name: str) -> Callable[[Any], Any]:
    """Mark a function for dispatch. Deprecated: use `use_kernel_forward_from_hub`, which does the same.

    Args:
        func_name: The layer name.

    Example:
        >>> double = use_kernel_func_from_hub("double")(lambda x: x * 2)
        >>> double(3)
        6
    """
    _deprecate("use_kernel_func_from_hub", "use_kernel_forward_from_hub", "use")
    return use_kernel_forward_from_hub(func_name)


set_module("kernels_plugins", globals())
