"""Locked kernels: a layer in one, as a plain frozen value, and the module of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from kernels_core import require_type, set_module

from ..kernel import load
from ..request import KernelRequest, locked_request
from ..source import KernelSource
from .caller import find_caller, find_lock
from .lockfile import Lock, read_lock


@dataclass(frozen=True, repr=False)
class LockedLayerRepository(KernelSource):
    """A layer in a kernel repository at the commit in a project's lock.

    The lock is read when this is made. Two with equal content are equal, wherever their locks lie.

    Args:
        repo_id: `owner/name` of the repository.
        lockfile: The `kernels.lock`. By default, that of the package whose code makes this.
        layer_name: Name of the layer class or function in the kernel's `layers`.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may.

    Raises:
        ArgumentError: There is no lock, it is malformed, or the kernel is not in it.
        ArgumentTypeError: An argument has the wrong type.

    Example:
        >>> silu = LockedLayerRepository("acme/silu", layer_name="Silu", lockfile="kernels.lock").load()
        >>> silu()(torch.zeros(2))
        tensor([0., 0.])
    """

    repo_id: str
    lockfile: str | Path | None = field(default=None, kw_only=True, compare=False)
    layer_name: str = field(kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)
    lock: Lock = field(init=False)

    def __post_init__(self) -> None:
        require_type(self.repo_id, str, "repo_id")
        require_type(self.layer_name, str, "layer_name")
        object.__setattr__(self, "lock", _lock(self.lockfile))
        object.__setattr__(self, "trust_remote_code", self.kernel_request().trust_remote_code)

    def kernel_request(self) -> KernelRequest:
        """Return the request for the kernel that has the layer."""
        return locked_request(self.lock, self.repo_id, trust_remote_code=self.trust_remote_code)

    def __repr__(self) -> str:
        lockfile = f"lockfile={str(self.lockfile)!r}" if self.lockfile is not None else ""
        return self._written(repr(self.repo_id), lockfile)


def get_locked_kernel(
    repo_id: str,
    *,
    lockfile: str | Path | None,
    trust_remote_code: bool | Sequence[str] = False,
    user_agent: str | Mapping[str, str] | None = None,
) -> ModuleType:
    """Load the kernel that a project has locked; downloads the files that are not in the cache.

    Args:
        repo_id: `owner/name` of the repository.
        lockfile: The `kernels.lock`; None for that of the package whose code calls.
        trust_remote_code: As for `get_kernel`.
        user_agent: As for `get_kernel`.

    Returns:
        The module of the kernel.

    Raises:
        ArgumentError: There is no lock, it is malformed, or the kernel is not in it.
        IntegrityError: A file is not the locked one; names it.
        ResolutionError: It cannot be loaded; names repository, commit, variant and what to do.

    Example:
        >>> get_locked_kernel("acme/silu", lockfile="kernels.lock").layers.Silu()(torch.zeros(1))
        tensor([0.])
    """
    lock = _lock(lockfile)
    return load(locked_request(lock, repo_id, trust_remote_code=trust_remote_code, user_agent=user_agent)).module


def load_kernel(repo_id: str, *, lockfile: str | Path | None, backend: str | None = None) -> ModuleType:
    """Load the kernel that a project has locked, from the cache; sends no request to the Hub.

    A file that is not in the cache is an error. `kernels-core download` puts it there.

    Args:
        repo_id: `owner/name` of the repository.
        lockfile: The `kernels.lock`; None for that of the package whose code calls.
        backend: `cpu`, or the backend that torch was built for, which is the default.

    Returns:
        The module of the kernel.

    Raises:
        ArgumentError, IntegrityError, ResolutionError: As for `get_locked_kernel`.

    Example:
        >>> load_kernel("acme/silu", lockfile="kernels.lock").layers.Silu()(torch.zeros(1))
        tensor([0.])
    """
    lock = _lock(lockfile)
    return load(locked_request(lock, repo_id, backend=backend, local_files_only=True)).module


def _lock(lockfile: str | Path | None) -> Lock:
    return find_lock(find_caller()) if lockfile is None else read_lock(lockfile)


set_module("kernels_plugins", globals())
