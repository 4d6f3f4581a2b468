"""All requests to the Hub; the only file of the loader that calls `huggingface_hub`.

The client keeps its own settings: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, tokens, retries and
progress bars. `KERNELS_CACHE` names another cache for kernels.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

from tqdm.contrib.concurrent import thread_map  # type: ignore[import-untyped,unused-ignore]

from kernels_core import LoadError, __version__, error_text, visible

from ..builds.integrity import RemoteFile, check_transfer, is_byte_code
from ..builds.machine import this_machine
from ..errors import AbsentError, RepositoryError, RevisionError, UnknownError, UnreachableError
from ..names import is_commit
from .files import arrived, in_cache
from .metadata_cache import MetadataCache, Pin
from .redirect import LARGEST, STATUS

try:
    from huggingface_hub import HfApi, constants, errors, get_token
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.tqdm import tqdm
except ValueError as error:  # it reads its variables then
    raise LoadError(
        f"huggingface_hub cannot be imported ({error_text(error)}): correct HF_ENDPOINT, or another of its variables, "
        "and start the program again"
    ) from error

T = TypeVar("T")

REPO_TYPES = ("kernel", "model")
"""Types of repository that hold kernels, the older form last."""

_PAUSES = (0.3, 1.0)
"""Seconds before a request is repeated, unless the Hub names a time."""

_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})")


def cache_folder(repo_id: str, repo_type: str) -> Path:
    """Return the folder of a repository in the cache."""
    try:
        return cache_root() / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    except errors.HFValidationError as error:
        raise LoadError(f"{error} Check the name") from error


def cache_root() -> Path:
    """Return the folder of the cache: that of the client, unless `KERNELS_CACHE` names another one."""
    place = os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise LoadError(f"KERNELS_CACHE is {place!r}, and there is no such user: name another folder") from error


def metadata_cache(repo_id: str) -> MetadataCache:
    """Return the cached metadata of a repository."""
    return MetadataCache(cache_folder(repo_id, REPO_TYPES[0]))


def hub_address() -> str:
    """Return the address of the Hub, without user and password."""
    return visible(constants.ENDPOINT)


def has_token() -> bool:
    """Return whether the client finds a token, which is never shown."""
    return bool(get_token())


def variant_folder(pin: Pin, variant: str) -> Path:
    """Return where the files of a variant lie once they are downloaded."""
    return cache_folder(pin.repo_id, pin.repo_type) / "snapshots" / pin.commit / "build" / variant


def describe_agent(caller: str | None) -> str:
    """Return the parts that are added to those of the client, which are library, client and Python.

    Example:
        >>> describe_agent("my-app/7").split("; ")[::4]
        ['my-app/7', 'file_type/kernel']
    """
    return "; ".join([*([caller] if caller else []), *_agent_parts()])


@cache
def _agent_parts() -> tuple[str, ...]:
    import torch

    machine = this_machine()
    tvm_ffi = ("tvm-ffi/{}.{}".format(*machine.tvm_ffi),) if machine.tvm_ffi else ()
    places = (f"backend/{machine.backend_tag}", f"platform/{machine.platform}", f"torch/{torch.__version__}")
    return *places, *tvm_ffi, "file_type/kernel"


@dataclass(frozen=True)
class Client:
    """Sends requests to the Hub.

    Every method raises `UnreachableError` where the Hub does not answer, and another `LoadError` where it refuses.

    Example:
        >>> Client(local_files_only=True).silence
        'local_files_only=True'
    """

    user_agent: str | None = None  # information about the caller for each request
    local_files_only: bool = False  # whether to send no request
    # seconds to wait for an answer, with all repetitions of the client, and for more of a download
    patience: float = field(default_factory=lambda: 6.0 * constants.HF_HUB_ETAG_TIMEOUT)
    persistent: bool = False  # whether to repeat a request for all that time, as one that asks for others does

    @property
    def silence(self) -> str:
        """The setting that forbids requests; empty if none does."""
        if self.local_files_only:
            return "local_files_only=True"
        return "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""

    def _api(self) -> HfApi:
        agent = None if constants.HF_HUB_DISABLE_TELEMETRY else self.user_agent
        return HfApi(library_name="kernels-core", library_version=__version__, user_agent=agent)

    def find_pin(self, repo_id: str, revision: str) -> Pin:
        """Return the commit of a revision, and the repository that serves it after redirects."""
        info, repo_type = self._of_any_type(
            repo_id, revision, lambda kind: self._api().repo_info(repo_id, repo_type=kind, revision=revision)
        )
        if not is_commit(info.sha):  # it becomes part of paths
            raise UnreachableError(f"{hub_address()} answered {info.sha!r} where a commit belongs: check HF_ENDPOINT")
        return Pin(info.id, repo_type, info.sha)

    def list_versions(self, repo_id: str) -> dict[int, str]:
        """Return the versions of a kernel, which are its branches `v<number>`, with the commit of each."""
        refs, _ = self._of_any_type(repo_id, None, lambda kind: self._api().list_repo_refs(repo_id, repo_type=kind))
        return {int(r.name[1:]): r.target_commit for r in refs.branches if _VERSION.fullmatch(r.name)}

    def _of_any_type(self, repo_id: str, revision: str | None, ask: Callable[[str], Any]) -> tuple[Any, str]:
        """Ask about a repository of each type, until there is one; return the answer and the type."""
        for repo_type in REPO_TYPES:
            with self._request(repo_id, revision, repo_type):
                try:
                    return self._ask(partial(ask, repo_type)), repo_type
                except errors.GatedRepoError:  # a subclass of the next one: it is there, and may not be read
                    raise
                except errors.RepositoryNotFoundError:  # a private one, too: the Hub does not tell
                    if repo_type == REPO_TYPES[-1]:
                        raise
        raise AssertionError("unreachable")  # pragma: no cover - the last type returns or raises

    def _ask(self, question: Callable[[], T], arrived: Callable[[], object] = lambda: None) -> T:
        """Send a request in a thread of its own, and wait for the answer: the client bounds no request as a whole.

        It also waits for as long as the Hub tells it to, which may be hours.

        Args:
            question: Sends the request.
            arrived: What has arrived so far: as long as that changes, the answer is waited for.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(_repeat(question, self))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: a request that is never answered must not keep the process from ending.
        threading.Thread(target=ask, daemon=True, name="kernels-core-request").start()
        seen = arrived()
        while not wait([answer], self.patience).done:
            before, seen = seen, arrived()
            if seen != before:
                continue
            raise UnreachableError(
                f"{constants.ENDPOINT} did not answer in {self.patience:g} seconds: check the network, set "
                "HF_HUB_ETAG_TIMEOUT to wait longer, or HF_HUB_OFFLINE=1 to use what is in the cache"
            )
        return answer.result()

    def is_trusted_publisher(self, owner: str) -> bool:
        """Return whether the Hub lists an organisation as a trusted publisher of kernels.

        A user, or an organisation that does not exist, is none.
        """
        with self._request(owner, None, REPO_TYPES[0]):
            try:
                overview = self._ask(lambda: self._api().get_organization_overview(owner))
            except errors.HfHubHTTPError as error:
                if error.response.status_code == 404:
                    return False
                raise
        return getattr(overview, "trustedKernelPublisher", False) is True

    def _list_tree(self, pin: Pin) -> list[RepoFile]:
        """List all files of a commit but byte code."""
        with self._request(pin.repo_id, pin.commit, pin.repo_type):
            place: dict[str, Any] = {"revision": pin.commit, "repo_type": pin.repo_type}
            entries = self._ask(lambda: list(self._api().list_repo_tree(pin.repo_id, recursive=True, **place)))
        return [entry for entry in entries if isinstance(entry, RepoFile) and not is_byte_code(entry.path)]

    def list_folder(self, pin: Pin, folder: str) -> tuple[RemoteFile, ...]:
        """List the files of a folder of a commit, by their path in that folder; none where there is no such folder."""
        inside = [entry for entry in self._list_tree(pin) if entry.path.startswith(f"{folder}/")]
        return tuple(_remote(entry, entry.path.removeprefix(f"{folder}/")) for entry in inside)

    def list_files(self, pin: Pin) -> tuple[dict[str, tuple[RemoteFile, ...]], RemoteFile | None]:
        """List the files of a commit."""
        variants: dict[str, list[RemoteFile]] = {}
        status = None
        for entry in self._list_tree(pin):
            folder, _, rest = entry.path.partition("/")
            variant, inside, path = rest.partition("/")
            if entry.path == STATUS:
                status = _remote(entry, STATUS)
            elif folder == "build" and inside:
                variants.setdefault(variant, []).append(_remote(entry, path))
        listed = {name: tuple(sorted(files, key=lambda file: file.path)) for name, files in sorted(variants.items())}
        return listed, status

    def fetch_folder(self, pin: Pin, folder: str, listed: Iterable[RemoteFile]) -> None:
        """Download the listed files of a folder, such as that of a variant."""
        # `snapshot_download` would list the repository again. A file that is in the cache is not requested.
        names = [f"{folder}/{file.path}" for file in listed]
        bar = {"desc": f"Fetching {len(names)} files", "tqdm_class": tqdm, "max_workers": 8}
        with self._request(pin.repo_id, pin.commit, pin.repo_type):
            try:
                thread_map(lambda name: self._download(pin, name), names, **bar)
            except OSError as error:
                if _is_wrong_size(error):  # older clients would go on from these bytes, though the file is another
                    for part in (cache_folder(pin.repo_id, pin.repo_type) / "blobs").glob("*.incomplete"):
                        part.unlink(missing_ok=True)
                raise

    def fetch_file(self, pin: Pin, path: str) -> Path:
        """Download one file of a commit."""
        with self._request(pin.repo_id, pin.commit, pin.repo_type):
            return Path(self._download(pin, path))

    def _download(self, pin: Pin, path: str) -> str:
        place: dict[str, Any] = {"repo_type": pin.repo_type, "revision": pin.commit, "cache_dir": cache_root()}
        blobs = cache_folder(pin.repo_id, pin.repo_type) / "blobs"
        known = os.path.lexists(blobs.parent / "snapshots" / pin.commit / path)  # it may be a link of the user's
        file = self._ask(lambda: self._api().hf_hub_download(pin.repo_id, path, **place), partial(arrived, blobs))
        return str(file if known else in_cache(Path(file), blobs))

    def read_status(self, pin: Pin, listed: RemoteFile) -> bytes:
        """Return the file that redirects a repository."""
        if listed.size > LARGEST:  # before it is downloaded
            raise UnknownError(f"its {STATUS} has {listed.size} bytes, so it is none. Tell its publisher")
        content = self.fetch_file(pin, STATUS).read_bytes()
        check_transfer({STATUS: content}, [listed])
        return content

    @contextmanager
    def _request(self, repo_id: str, revision: str | None, repo_type: str) -> Iterator[None]:
        """Turn exceptions of the client into errors of ours, which name a remedy; leave those of the disk."""
        if self.silence:
            raise not_cached(self.silence)
        try:
            yield
        except LoadError:  # one of ours already, as from `_ask`
            raise
        except errors.RevisionNotFoundError as error:
            raise RevisionError(self._no_revision(repo_id, str(revision), repo_type)) from error
        except Exception as error:
            translated = _translate(error, repo_id)
            if translated is None:
                raise
            raise translated from error

    def _no_revision(self, repo_id: str, revision: str, repo_type: str) -> str:
        """Return the message for a missing revision, with the revisions that exist, where the Hub lists them."""
        try:
            refs = self._ask(lambda: self._api().list_repo_refs(repo_id, repo_type=repo_type))
        except Exception as error:  # the missing revision is the answer; this is only a note in it
            return f"it has no revision {revision!r} (which exist could not be asked: {type(error).__name__})"
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
        return f"it has no revision {revision!r}: branches and tags are {', '.join(names) or 'none'}"


def _remote(entry: RepoFile, path: str) -> RemoteFile:
    return RemoteFile(path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)


def _repeat(question: Callable[[], T], client: Client) -> T:
    """Send a request again, after a short time, where the Hub may answer then: the client repeats only some of them."""
    end = time.monotonic() + client.patience
    for pause in chain(_PAUSES, repeat(4.0) if client.persistent else ()):
        try:
            return question()
        except Exception as error:
            response = getattr(error, "response", None)
            status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
            asked = str(headers.get("Retry-After", ""))
            pause = float(asked) if asked.isdecimal() else pause
            # The caller waits for all of it.
            late = time.monotonic() + pause > end
            if late or not (_is_network_error(error) or status in (408, 429) or (status or 0) >= 500):
                raise
        time.sleep(pause)
    return question()


# --- Errors --------------------------------------------------------------------------------------


def not_cached(silence: str) -> AbsentError:
    """Return the error for a file that is not in the cache, where no request may be sent."""
    return AbsentError(f"it is not in the cache, and {silence} is set: load it once online, or unset that")


_STATUS: dict[int, tuple[type[LoadError], str]] = {
    401: (RepositoryError, "the Hub does not accept the token (401): log in with `hf auth login`, or correct HF_TOKEN"),
    403: (RepositoryError, "the Hub forbids access (403): ask the publisher, or use a token that may read it"),
    404: (RepositoryError, "the Hub does not have it (404): check name and revision"),
    429: (UnreachableError, "the Hub got too many requests (429): wait, or log in with `hf auth login`"),
}


def _translate(error: Exception, repo_id: str) -> LoadError | None:
    """Return our error for one of the client, also for an answer that it cannot read; None for one of the disk."""
    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return RepositoryError(
            f"access to it is gated: ask for it at {hub}/{repo_id}, and log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.DisabledRepoError):
        return RepositoryError("the Hub has disabled it: ask its publisher, or use another repository")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RepositoryError(
            f"{hub} has no such repository, or it is private: check the name, and log in with `hf auth login` or set "
            "HF_TOKEN if you have access"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status >= 500 or status == 408:
            return UnreachableError(f"the Hub is in trouble ({status}): try again later")
        kind, message = _STATUS.get(status, (LoadError, f"the Hub answered {status}: {error}"))
        return kind(message)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return not_cached("HF_HUB_OFFLINE")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return UnreachableError(f"the download failed: {_root(error)}. Check the connection, and try again")
    if isinstance(error, json.JSONDecodeError):
        return UnreachableError(
            f"{hub} answered something that is not JSON ({error}), as a login page or proxy does: open it in a "
            "browser, or set HF_ENDPOINT"
        )
    if not (token := get_token() or "").isascii() or not token.isprintable():  # that of the transport is obscure
        return RepositoryError(
            "the token has a character that no token of the Hub has: correct HF_TOKEN, or log in with `hf auth login`"
        )
    if _is_network_error(error):
        return UnreachableError(
            f"{hub} cannot be reached ({type(error).__name__}: {error}): check the network and HF_ENDPOINT, or set "
            "HF_HUB_OFFLINE=1 to use what is in the cache"
        )
    if _is_wrong_size(error):
        return UnreachableError(f"the download failed: {error} Try again")
    if isinstance(error, OSError):
        return None
    return UnreachableError(f"the client failed: {type(error).__name__}: {error}. Try again; if it persists, report it")


def _is_network_error(error: BaseException) -> bool:
    """Whether an exception comes from the transport: its classes differ between versions of the client."""
    transport = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    return isinstance(error, transport) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def _is_wrong_size(error: BaseException) -> bool:
    """Whether the client reports a file that is shorter or longer than announced: a bare OSError, with no errno."""
    return type(error) is OSError and error.errno is None


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
