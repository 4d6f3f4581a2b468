"""Requests for kernels, as plain values: making one costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kernels_core import ArgumentError, ArgumentTypeError, require_type, set_module

from .dependency import Dependency
from .errors import DependencyError
from .locking.lockfile import Lock, LockedKernel
from .names import is_repo_id, is_revision, is_version


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How kernels are requested: the same for a kernel and for all that it depends on."""

    # whether code of a publisher that the Hub does not list as trusted may run: True, or a sequence of the
    # `owner/name` that may. It applies to dependencies, too
    trust_remote_code: bool | Sequence[str] = False
    backend: str | None = None  # `cpu`, or the backend that torch was built for, which is the default
    # information about the caller for each request to the Hub, unless telemetry is switched off
    user_agent: str | Mapping[str, str] | None = field(default=None, compare=False)
    check_arch: bool = True  # whether a build without code for the current device is refused
    local_files_only: bool = False  # whether to send no request to the Hub, as with `HF_HUB_OFFLINE`
    # the lock with the commits and hashes of dependencies; without one, any commit of them is accepted
    lock: Lock | None = field(default=None, repr=False)
    # whether the kernel is for a call on the CPU: with a torch that was built for an accelerator, builds for
    # the CPU come first then
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.backend is not None:
            require_type(self.backend, str, "backend")
        for name in ("check_arch", "local_files_only", "on_cpu"):
            require_type(getattr(self, name), bool, name)
        object.__setattr__(self, "trust_remote_code", _trust(self.trust_remote_code))
        object.__setattr__(self, "user_agent", _agent(self.user_agent))

    def trusts(self, repo_id: str) -> bool:
        """Whether the user allows code of this repository to run, whoever published it."""
        allowed = self.trust_remote_code
        return allowed is True or (isinstance(allowed, tuple) and repo_id in allowed)

    def for_dependency(self, wanted: Dependency) -> KernelRequest:
        """Request a kernel that another one depends on: the locked one, where there is a lock."""
        options: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(RequestOptions)}
        if self.lock is None:
            return KernelRequest(wanted.repo_id, revision=wanted.revision, version=wanted.version, **options)
        locked = self.lock.find(wanted)
        if locked is None:
            raise DependencyError(
                f"it depends on {wanted}, which is not locked in {self.lock.origin}. To correct that, {self.lock.again}"
            )
        return _locked(wanted, locked, options)


@dataclass(frozen=True)
class KernelRequest(RequestOptions):
    """A request for a kernel on the Hub.

    Example:
        >>> KernelRequest("acme/silu", version=1).wanted
        'v1'
    """

    repo_id: str  # `owner/name` of the repository
    # branch, tag or commit. Exactly one of `revision` and `version` is given
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)  # number of the kernel version: the branch `v<version>`
    # the commit in a lock: revision or version are not looked up then
    commit: str | None = field(default=None, kw_only=True)
    # pairs of build variant and hash in a lock; None or empty if it has none
    locked: tuple[tuple[str, str], ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_type(self.repo_id, str, "repo_id")
        if not is_repo_id(self.repo_id):
            raise ArgumentError(f"repo_id is {self.repo_id!r}: write 'owner/name'.")
        if (self.revision is None) == (self.version is None) and self.commit is None:
            raise ArgumentError(
                f"Repository {self.repo_id!r} needs exactly one of revision='<branch, tag or commit>' and "
                f"version=<number>, got revision={self.revision!r} and version={self.version!r}."
            )
        if self.revision is not None:
            require_type(self.revision, str, "revision")
            if not is_revision(self.revision):
                raise ArgumentError(f"revision is {self.revision!r}: name a branch, tag or commit.")
        if self.version is not None and not is_version(self.version):
            raise ArgumentError(f"version is {self.version!r}: kernel versions are whole numbers such as 1.")
        super().__post_init__()

    @property
    def wanted(self) -> str:
        """The revision as the Hub knows it; that of a locked kernel is its commit."""
        if self.commit is not None:
            return self.commit
        return f"v{self.version}" if self.revision is None else self.revision

    @property
    def ref(self) -> str:
        """The revision as git spells it out, where it is a version: a tag of that name is none."""
        return f"refs/heads/v{self.version}" if self.commit is None and self.version is not None else self.wanted

    def __str__(self) -> str:
        if self.commit is None:
            return f"{self.repo_id} at {self.wanted}"
        revision = self.revision or (f"v{self.version}" if self.version is not None else self.commit[:12])
        return f"{self.repo_id} at {revision}, locked"


@dataclass(frozen=True)
class RepoInfo:
    """The repository of a kernel; policies are asked about it before anything of it is downloaded.

    Attributes:
        repo_id: The repository that served it.
        revision: Its commit.
    """

    repo_id: str
    revision: str


def locked_request(lock: Lock, locked: LockedKernel | str, **options: Any) -> KernelRequest:
    """Request the commit that a lock has, and the same for its dependencies."""
    if isinstance(locked, str):
        locked = lock.require(locked)
    return _locked(locked.dependency, locked, {**options, "lock": lock})


def _locked(wanted: Dependency, locked: LockedKernel, options: dict[str, Any]) -> KernelRequest:
    named: dict[str, Any] = {"revision": wanted.revision, "version": wanted.version}
    return KernelRequest(wanted.repo_id, commit=locked.commit, locked=locked.hashes, **named, **options)


def _trust(trusted: Any) -> bool | tuple[str, ...]:
    if isinstance(trusted, bool):
        return trusted
    listed = isinstance(trusted, list | tuple | set | frozenset)
    if not listed or not all(isinstance(repo_id, str) for repo_id in trusted):
        raise ArgumentTypeError(f"trust_remote_code is True, False or a list of 'owner/name', not {trusted!r}.")
    return tuple(trusted)  # hashable: requests are keys


def _agent(agent: Any) -> str | None:
    """Return the text that is sent: a mapping as `key/value; key/value`."""
    if agent is None:
        return None
    if isinstance(agent, Mapping):
        agent = "; ".join(f"{key}/{value}" for key, value in agent.items())
    if not isinstance(agent, str):
        raise ArgumentTypeError(f"user_agent is a text or a mapping of names to values, not {agent!r}.")
    if not agent.isascii() or not agent.isprintable():
        raise ArgumentError(f"user_agent is {agent!r}: a header holds only printable ASCII characters.")
    return agent.strip() or None


set_module("kernels_plugins", globals())
