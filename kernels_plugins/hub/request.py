"""What is asked for: a kernel, as a plain value. Making one costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kernels_core import ArgumentError, ArgumentTypeError

from .dependency import Dependency
from .errors import DependencyError
from .locking.lockfile import Lock

LockedVariants = tuple[tuple[str, str], ...]
"""Build variant and the hash that a lock promises for it, as `LockedKernel.hashes`."""


@dataclass(frozen=True)
class Terms:
    """How kernels are asked for: the same for a kernel and all that it depends on.

    Attributes are those of `KernelRequest`.
    """

    trust_remote_code: bool | Sequence[str] = False
    backend: str | None = None
    user_agent: str | Mapping[str, str] | None = None
    check_arch: bool = True
    local_files_only: bool = False
    lock: Lock | None = None
    on_cpu: bool = False

    def ask(self, wanted: Dependency) -> KernelRequest:
        """Ask for a kernel that another one depends on; where there is a lock, for what that says.

        Raises:
            LoadError: If there is a lock, and it is not in it.
        """
        options: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.lock is None:
            return KernelRequest(wanted.repo_id, revision=wanted.revision, version=wanted.version, **options)
        locked = self.lock.find(wanted)
        if locked is None:
            raise DependencyError(
                f"it depends on {wanted}, which is not locked in {self.lock.origin}. Lock anew with "
                "`kernels-core lock <project>`"
            )
        return KernelRequest(
            wanted.repo_id,
            revision=wanted.revision,
            version=wanted.version,
            commit=locked.commit,
            locked=locked.hashes,
            **options,
        )


@dataclass(frozen=True)
class KernelRequest:
    """A kernel on the Hub that is asked for.

    Args:
        repo_id: `owner/name` of the repository.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may. It counts for dependencies, too.
        backend: `cpu`, or the backend that torch was built for, which is the default.
        user_agent: What to tell the Hub about the caller in each request, unless telemetry is switched off.
        check_arch: Whether a build without code for the current device is refused.
        local_files_only: Whether to ask nothing of the Hub, as with `HF_HUB_OFFLINE`.
        commit: The commit that a lock says: revision or version are then not asked for.
        locked: Hash of each build variant that a lock says; None or empty if it says none.
        lock: The lock that commits and hashes of dependencies are looked up in; without it they are free.
        on_cpu: Whether it is for a call on the CPU: with a torch that was built for an accelerator, builds for the
            CPU then come first.

    Raises:
        ArgumentError: If not exactly one of revision and version is given, or one is malformed.
        ArgumentTypeError: If an argument has the wrong type.

    Example:
        >>> KernelRequest("acme/silu", version=1).wanted
        'v1'
    """

    repo_id: str
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)
    backend: str | None = field(default=None, kw_only=True)
    user_agent: str | Mapping[str, str] | None = field(default=None, kw_only=True, compare=False)
    check_arch: bool = field(default=True, kw_only=True)
    local_files_only: bool = field(default=False, kw_only=True)
    commit: str | None = field(default=None, kw_only=True)
    locked: LockedVariants | None = field(default=None, kw_only=True)
    lock: Lock | None = field(default=None, kw_only=True, repr=False)
    on_cpu: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what names no kernel, and turn what would not hash into what does."""
        _expect(self.repo_id, str, "repo_id")
        owner, slash, name = self.repo_id.partition("/")
        if not (owner and slash and name) or "/" in name:
            raise ArgumentError(f"repo_id is {self.repo_id!r}: write 'owner/name'.")
        if (self.revision is None) == (self.version is None) and self.commit is None:
            raise ArgumentError(
                f"Repository {self.repo_id!r} needs exactly one of revision='<branch, tag or commit>' and "
                f"version=<number>, got revision={self.revision!r} and version={self.version!r}."
            )
        if self.revision is not None:
            _expect(self.revision, str, "revision")
            if not self.revision:
                raise ArgumentError("revision is '': name a branch, tag or commit.")
        if self.version is not None and (type(self.version) is not int or self.version < 0):
            raise ArgumentError(f"version is {self.version!r}: kernel versions are whole numbers such as 1.")
        if self.backend is not None:
            _expect(self.backend, str, "backend")
        object.__setattr__(self, "trust_remote_code", _trust(self.trust_remote_code))
        object.__setattr__(self, "user_agent", _agent(self.user_agent))

    @property
    def wanted(self) -> str:
        """The revision as the Hub knows it; that of a locked kernel is its commit."""
        if self.commit is not None:
            return self.commit
        return f"v{self.version}" if self.revision is None else self.revision

    @property
    def terms(self) -> Terms:
        """How it is asked for."""
        return Terms(**{field.name: getattr(self, field.name) for field in fields(Terms)})

    def trusts(self, repo_id: str) -> bool:
        """Whether the user allows code of this repository to run, whoever published it."""
        return self.trust_remote_code is True or (
            isinstance(self.trust_remote_code, tuple) and repo_id in self.trust_remote_code
        )

    def __str__(self) -> str:
        """Name repository and revision, for messages."""
        if self.commit is None:
            return f"{self.repo_id} at {self.wanted}"
        said = self.revision or (f"v{self.version}" if self.version is not None else self.commit[:12])
        return f"{self.repo_id} at {said}, locked"


def _trust(trusted: Any) -> bool | tuple[str, ...]:
    if isinstance(trusted, bool):
        return trusted
    listed = isinstance(trusted, list | tuple | set | frozenset)
    if not listed or not all(isinstance(repo_id, str) for repo_id in trusted):
        raise ArgumentTypeError(f"trust_remote_code is True, False or a list of 'owner/name', not {trusted!r}.")
    return tuple(trusted)


def _agent(agent: Any) -> str | None:
    """Return the text that travels: a mapping as `key/value; key/value`."""
    if agent is None:
        return None
    if isinstance(agent, Mapping):
        agent = "; ".join(f"{key}/{value}" for key, value in agent.items())
    if not isinstance(agent, str):
        raise ArgumentTypeError(f"user_agent is a text or a mapping of names to values, not {agent!r}.")
    if not agent.isascii() or not agent.isprintable():
        raise ArgumentError(f"user_agent is {agent!r}: a header holds printable ASCII characters alone.")
    return agent.strip() or None


def _expect(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name} is a {kind.__name__}, not {value!r}.")
