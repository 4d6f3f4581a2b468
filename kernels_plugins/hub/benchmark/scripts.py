"""The benchmark scripts of a kernel: found, downloaded and compared with the list of the Hub. None is run here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kernels_core import authorize

from .. import fetching
from ..builds.integrity import check_transfer
from ..errors import AbsentError
from ..request import KernelRequest
from ..signatures.checking import refuse_unsigned

FOLDER = "benchmarks"
_PATTERN = "benchmark*.py"


@dataclass(frozen=True)
class Scripts:
    """The scripts of one commit, or of a folder on disk."""

    origin: str  # the kernel and its commit, or the folder
    repo_id: str  # the repository that serves the kernel; empty for a folder
    commit: str  # likewise
    folder: Path  # that in which `benchmarks` lies
    digests: Mapping[str, str]  # SHA-256 of each script, by name

    @property
    def digest(self) -> str:
        """One SHA-256 of all scripts, in the order of their names, as `kernels benchmark` makes it."""
        total = hashlib.sha256()
        for name in sorted(self.digests):
            total.update((self.folder / FOLDER / name).read_bytes())
        return total.hexdigest()


def find_scripts(request: KernelRequest) -> Scripts:
    """Install a kernel, and download the scripts that come with it.

    Trust in the publisher, policies, digests and locks are checked as for every kernel, before a script is downloaded.

    Raises:
        ResolutionError: If the kernel cannot be installed, or has no scripts.
    """
    from ..client.download import Client, describe_agent

    installed = fetching.install(request)
    resolved = installed.selected.resolved
    build = installed.selected.folder
    if resolved is None:  # LOCAL_KERNELS names a folder instead
        return _scripts(build.parents[1] if build.parent.name == "build" else build, installed.selected.origin)
    refuse_unsigned("the benchmark scripts of a kernel are no part of its build, so no signature covers them")
    pin = resolved.pin
    client = Client(describe_agent(None))
    with fetching.naming(str(request)):
        listed = client.list_folder(pin, FOLDER)
        if not listed:
            raise AbsentError(_missing(pin.repo_id))
        client.fetch_folder(pin, FOLDER, listed)
        folder = build.parents[1]
        paths = [folder / FOLDER / file.path for file in listed]
        paths += (folder / FOLDER).glob(_PATTERN)  # one that the Hub does not list would run, too
        check_transfer({path.relative_to(folder / FOLDER).as_posix(): path.read_bytes() for path in paths}, listed)
        return _scripts(folder, str(pin), pin.repo_id, pin.commit)


def find_local_scripts(folder: Path) -> Scripts:
    """Return the scripts of a kernel in a folder on disk."""
    authorize(folder, fetching.PLUGIN)
    return _scripts(folder, str(folder))


def _scripts(folder: Path, origin: str, repo_id: str = "", commit: str = "") -> Scripts:
    paths = sorted((folder / FOLDER).glob(_PATTERN))
    if not paths:
        raise AbsentError(_missing(origin))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return Scripts(origin, repo_id, commit, folder, digests)


def _missing(origin: str) -> str:
    return f"{origin} comes without benchmarks: it has no {FOLDER}/{_PATTERN}. Measure it with a script of your own"
