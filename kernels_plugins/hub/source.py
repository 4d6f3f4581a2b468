"""Layers in kernel repositories, as plain frozen values: making one costs nothing, the first call loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kernels_core import ArgumentError, KernelLayer, LoadedLayer, ResolutionError, require_type, set_module

from .locking.lockfile import Lock, format_hashes, format_lock, parse_lock
from .request import KernelRequest, RequestOptions, locked_request

if TYPE_CHECKING:
    from .kernel import LoadedKernel


class KernelSource:
    """A layer of a kernel: the sources that the plugin `hub` loads."""

    layer_name: str
    is_function: ClassVar[bool] = False
    """Whether the layer is a function at the top of the kernel, not a member of its `layers`."""

    def kernel_request(self) -> KernelRequest:
        """Return the request for the kernel that has the layer."""
        raise NotImplementedError

    @property
    def wanted(self) -> str:
        """The revision as the Hub knows it; that of a locked kernel is its commit."""
        return self.kernel_request().wanted

    def trusts(self, repo_id: str) -> bool:
        """Whether the user allows code of this repository to run, whoever published it."""
        return self.kernel_request().trusts(repo_id)

    def load_kernel(self, **options: Any) -> LoadedKernel:
        """Fetch, check and import the kernel; options of `RequestOptions` replace those of the source."""
        from .kernel import load  # imports what a mapping that is only written down does not need

        return load(replace(self.kernel_request(), **options))

    def load(self) -> KernelLayer:
        """Fetch, check and import the layer."""
        return self.find_layer(self.load_kernel()).layer

    def find_layer(self, kernel: LoadedKernel) -> LoadedLayer:
        """Return the layer in its kernel, which was loaded."""
        from .builds.importing import find_function, find_layer

        find = find_function if self.is_function else find_layer
        try:
            layer = find(kernel.module, self.layer_name)
            known: dict[str, Any] = {
                "provenance": kernel.provenance,
                "content": kernel.content,
                "pin": _as_pin(kernel.lock),
            }
            return LoadedLayer(layer, kernel.origin, kernel.checked, **known)
        except ResolutionError as error:
            raise type(error)(f"{kernel.place}: {error}") from error

    def pinned(self, pin: Any) -> KernelSource:
        """Return a source of the kernel that a decision file has: this commit, with these files."""
        return PinnedSource(self, _read_pin(pin))

    def _written(self, *place: str, pin: str = "") -> str:
        """Return the source as it is written: where the kernel is, the name of the layer, and other arguments."""
        name = f"{'func' if self.is_function else 'layer'}_name={self.layer_name!r}"
        trust = getattr(self, "trust_remote_code", False)
        more = (*place, name, pin, f"trust_remote_code={trust!r}" if trust else "")
        return f"{type(self).__name__}({', '.join(filter(None, more))})"


@dataclass(frozen=True, repr=False)
class LayerRepository(KernelSource):
    """A layer in a kernel repository on the Hub.

    Args:
        repo_id: `owner/name` of the repository.
        layer_name: Name of the layer class or function in the kernel's `layers`.
        revision: Branch, tag or commit. Exactly one of `revision` and `version` is given.
        version: Number of the kernel version: the branch `v<version>`.
        trust_remote_code: Whether code of a publisher that the Hub does not list as trusted may
            run: True, or a sequence of the `owner/name` that may.
        user_agent: Information about the caller for each request to the Hub, a text or a mapping.

    Raises:
        ArgumentError: Not exactly one of revision and version is given, or one is malformed.
        ArgumentTypeError: An argument has the wrong type.

    Example:
        >>> repository = LayerRepository("acme/silu", layer_name="Silu", version=1)
        >>> repository
        LayerRepository('acme/silu', layer_name='Silu', version=1)
        >>> silu = repository.load()
        >>> silu()(torch.zeros(2))
        tensor([0., 0.])
    """

    repo_id: str
    layer_name: str = field(kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    version: int | None = field(default=None, kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)
    user_agent: str | Mapping[str, str] | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        require_type(self.layer_name, str, "layer_name")
        request = self.kernel_request()
        # Checked, and made hashable: a list that the caller changes later would change this value.
        object.__setattr__(self, "trust_remote_code", request.trust_remote_code)
        object.__setattr__(self, "user_agent", request.user_agent)

    def kernel_request(self) -> KernelRequest:
        """Return the request for the kernel that has the layer."""
        pin: dict[str, Any] = {"revision": self.revision, "version": self.version}
        return KernelRequest(self.repo_id, trust_remote_code=self.trust_remote_code, user_agent=self.user_agent, **pin)

    def __repr__(self) -> str:
        pin = f"revision={self.revision!r}" if self.version is None else f"version={self.version}"
        return self._written(repr(self.repo_id), pin=pin)


@dataclass(frozen=True, repr=False)
class LocalLayerRepository(KernelSource):
    """A layer in a kernel repository on disk: a folder with `build/`, with variants, or one variant itself.

    Code that the user points to is trusted; its digest is checked where it has one.

    Args:
        repo_path: The folder.
        layer_name: Name of the layer class or function in the kernel's `layers`.

    Raises:
        ArgumentTypeError: An argument has the wrong type.

    Example:
        >>> LocalLayerRepository("kernels/activation", layer_name="SiluAndMul")
        LocalLayerRepository('kernels/activation', layer_name='SiluAndMul')
    """

    repo_path: str | Path
    layer_name: str = field(kw_only=True)

    def __post_init__(self) -> None:
        require_type(self.repo_path, (str, Path), "repo_path")
        require_type(self.layer_name, str, "layer_name")
        object.__setattr__(self, "repo_path", Path(self.repo_path))

    @property
    def path(self) -> Path:
        """The folder as a `Path`."""
        return Path(self.repo_path)

    def load_kernel(self, **options: Any) -> LoadedKernel:
        """Check and import the kernel, with options of `RequestOptions`."""
        from .kernel import load_folder

        return load_folder(self.path, RequestOptions(**{"check_arch": False, **options}))

    def __repr__(self) -> str:
        return self._written(repr(str(self.repo_path)))


@dataclass(frozen=True, repr=False)
class PinnedSource(KernelSource):
    """A source of a kernel, at the commit and with the files that a decision file has."""

    source: KernelSource
    lock: Lock

    def kernel_request(self) -> KernelRequest:
        """Return the request for that commit."""
        asked = self.source.kernel_request()
        kept = {"trust_remote_code": asked.trust_remote_code, "user_agent": asked.user_agent}
        return locked_request(self.lock, self.lock.kernels[0], **kept)

    def find_layer(self, kernel: LoadedKernel) -> LoadedLayer:
        """Return the layer of the source."""
        return self.source.find_layer(kernel)

    def __repr__(self) -> str:
        return repr(self.source)


def _as_pin(lock: Lock | None) -> Any:
    """Return a lock as the JSON that a decision file has of a kernel."""
    if lock is None:
        return None
    return {"lock": json.loads(format_lock(lock)), "hashes": json.loads(format_hashes(lock))}


def _read_pin(pin: Any) -> Lock:
    """Read such JSON; raise `ArgumentError` if it is malformed."""
    if not isinstance(pin, dict) or pin.keys() != {"lock", "hashes"} or not pin["lock"]:
        raise ArgumentError(f"The decision file has no commit of a kernel, but {pin!r}: freeze the decisions anew.")
    lock = parse_lock(*map(json.dumps, (pin["lock"], pin["hashes"])), origin="the decision file")
    return replace(lock, again="freeze the decisions anew with `kernels-core freeze`")


set_module("kernels_plugins", globals())
