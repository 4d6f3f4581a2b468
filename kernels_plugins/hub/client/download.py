"""Everything that is asked of the Hub; the only file that calls `huggingface_hub`.

The client keeps its own settings: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, tokens, retries and
progress bars. `KERNELS_CACHE` names another cache for kernels.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import tqdm

from kernels_core import LoadError, __version__

from ..builds.integrity import RemoteFile, check_transfer, is_byte_code
from ..errors import AbsentError, UnknownError, UnreachableError
from .cache import COMMIT, Notes, Pin
from .redirect import LARGEST, STATUS

REPO_TYPES = ("kernel", "model")
"""Types of repository that hold kernels, the older form last."""

_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})")


def cache_folder(repo_id: str, repo_type: str) -> Path:
    """Return the folder of a repository in the cache.

    Raises:
        LoadError: If no repository can have that name.
    """
    try:
        return _cache() / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    except errors.HFValidationError as error:
        raise LoadError(f"{error} Check the name") from error


def _cache() -> Path:
    return Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE).expanduser()


def notes(repo_id: str) -> Notes:
    """Return the notes on a repository."""
    return Notes(cache_folder(repo_id, REPO_TYPES[0]))


def variant_folder(pin: Pin, variant: str) -> Path:
    """Return where the files of a variant lie once they are downloaded."""
    return cache_folder(pin.repo_id, pin.repo_type) / "snapshots" / pin.commit / "build" / variant


@dataclass(frozen=True)
class Client:
    """Asks the Hub.

    Attributes:
        user_agent: What is told about the caller in each request.
        local_files_only: Whether to ask nothing.

    Example:
        >>> Client(local_files_only=True).silence
        'local_files_only=True'
    """

    user_agent: str | None = None
    local_files_only: bool = False

    @property
    def silence(self) -> str:
        """What forbids to ask; empty if nothing does."""
        if self.local_files_only:
            return "local_files_only=True"
        return "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""

    def _api(self) -> HfApi:
        told = None if constants.HF_HUB_DISABLE_TELEMETRY else self.user_agent
        return HfApi(library_name="kernels-core", library_version=__version__, user_agent=told)

    def find_pin(self, repo_id: str, revision: str) -> Pin:
        """Ask the Hub which commit a revision is, and which repository serves it after redirects.

        Raises:
            LoadError: If there is no such repository or revision; names the revisions that exist.
            UnreachableError: If the Hub does not answer.
        """
        missing: errors.RepositoryNotFoundError | None = None
        for repo_type in REPO_TYPES:
            with _explained(self, repo_id, revision, repo_type):
                try:
                    info: Any = self._api().repo_info(repo_id, repo_type=repo_type, revision=revision)
                except errors.GatedRepoError:
                    raise
                except errors.RepositoryNotFoundError as error:
                    missing = missing or error
                    continue
                if not COMMIT.fullmatch(str(info.sha)):  # it becomes part of paths
                    raise LoadError(
                        f"{constants.ENDPOINT} answered {info.sha!r} where a commit belongs: check HF_ENDPOINT"
                    )
                return Pin(info.id, repo_type, info.sha)
        with _explained(self, repo_id, revision, REPO_TYPES[0]):
            assert missing is not None
            raise missing
        raise AssertionError("unreachable")  # pragma: no cover - the context above always raises

    def is_trusted_publisher(self, owner: str) -> bool:
        """Ask the Hub whether it lists an organisation as a trusted publisher of kernels.

        A user, or an organisation that does not exist, is none.

        Raises:
            UnreachableError: If the Hub does not answer.
        """
        with _explained(self, owner, None, REPO_TYPES[0]):
            try:
                overview = self._api().get_organization_overview(owner)
            except errors.HfHubHTTPError as error:
                if error.response.status_code == 404:
                    return False
                raise
        return getattr(overview, "trustedKernelPublisher", False) is True

    def list_files(self, pin: Pin) -> tuple[dict[str, tuple[RemoteFile, ...]], RemoteFile | None]:
        """List what a commit holds.

        Returns:
            The files of each build variant, without byte code; and the file that tells what became of the repository,
            if there is one.

        Raises:
            LoadError: If it cannot be listed.
            UnreachableError: If the Hub does not answer.
        """
        if self.silence:
            raise not_cached(self.silence)
        variants: dict[str, list[RemoteFile]] = {}
        status = None
        with _explained(self, pin.repo_id, pin.commit, pin.repo_type):
            entries = list(
                self._api().list_repo_tree(pin.repo_id, recursive=True, revision=pin.commit, repo_type=pin.repo_type)
            )
        for entry in entries:
            if not isinstance(entry, RepoFile) or is_byte_code(entry.path):
                continue
            sha256 = entry.lfs.sha256 if entry.lfs else None
            folder, _, rest = entry.path.partition("/")
            variant, inside, path = rest.partition("/")
            if entry.path == STATUS:
                status = RemoteFile(STATUS, entry.size, entry.blob_id, sha256)
            elif folder == "build" and inside:
                variants.setdefault(variant, []).append(RemoteFile(path, entry.size, entry.blob_id, sha256))
        listed = {name: tuple(sorted(files, key=lambda file: file.path)) for name, files in sorted(variants.items())}
        return listed, status

    def fetch_variant(self, pin: Pin, variant: str, listed: Iterable[RemoteFile]) -> None:
        """Download the files of one variant, and no byte code.

        Raises:
            LoadError: If they cannot be downloaded.
            UnreachableError: If the Hub does not answer, or stops to.
        """
        if self.silence:
            raise not_cached(self.silence)
        wanted = [file.path for file in listed]

        def fetch(path: str) -> None:
            name = f"build/{variant}/{path}"
            self._api().hf_hub_download(
                pin.repo_id, name, repo_type=pin.repo_type, revision=pin.commit, cache_dir=_cache()
            )

        with _explained(self, pin.repo_id, pin.commit, pin.repo_type):
            try:
                # The client would list the repository again. What is there already is not asked for.
                with ThreadPoolExecutor(min(8, len(wanted) or 1)) as pool:
                    for _ in cast(Any, tqdm)(
                        pool.map(fetch, wanted), desc=f"Fetching {len(wanted)} files", total=len(wanted)
                    ):
                        pass
            except OSError as error:
                if _is_wrong_size(error):  # older clients would go on from what they have, though it is not the file
                    for part in (cache_folder(pin.repo_id, pin.repo_type) / "blobs").glob("*.incomplete"):
                        part.unlink(missing_ok=True)
                raise

    def fetch_file(self, pin: Pin, path: str) -> Path:
        """Download one file of a commit.

        Raises:
            LoadError: If it cannot be downloaded.
            UnreachableError: If the Hub does not answer, or stops to.
        """
        if self.silence:
            raise not_cached(self.silence)
        with _explained(self, pin.repo_id, pin.commit, pin.repo_type):
            found = self._api().hf_hub_download(
                pin.repo_id, path, repo_type=pin.repo_type, revision=pin.commit, cache_dir=_cache()
            )
        return Path(found)

    def read_status(self, pin: Pin, listed: RemoteFile) -> bytes:
        """Return the file that tells what became of a repository.

        Raises:
            LoadError: If it cannot be downloaded, or is too large to be one.
            UnreachableError: If the Hub does not answer.
        """
        if listed.size > LARGEST:
            raise UnknownError(f"its {STATUS} has {listed.size} bytes, so it is none. Tell its publisher")
        content = self.fetch_file(pin, STATUS).read_bytes()
        check_transfer({STATUS: content}, [listed])
        return content

    def list_versions(self, repo_id: str, repo_type: str = REPO_TYPES[0]) -> dict[int, str]:
        """Return the versions of a kernel, which are its branches `v<number>`, with the commit of each.

        Raises:
            LoadError: If there is no such repository.
            UnreachableError: If the Hub does not answer.
        """
        if self.silence:
            raise not_cached(self.silence)
        with _explained(self, repo_id, None, repo_type):
            refs = self._api().list_repo_refs(repo_id, repo_type=repo_type)
        return {int(r.name[1:]): r.target_commit for r in refs.branches if _VERSION.fullmatch(r.name)}


def discard(place: Path) -> None:
    """Remove downloaded files that turned out wrong, so that the next attempt downloads them anew.

    Args:
        place: The folder of a build, or one file in it.
    """
    folder = place if place.is_dir() else place.parent
    blobs = (folder.parents[3] / "blobs").resolve()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_symlink():
            blob = path.resolve()
            path.unlink()
            if blob.parent == blobs:  # whoever changed the cache may have made it lead anywhere
                blob.unlink(missing_ok=True)
        elif path.is_file():
            path.unlink()


# --- Telling what went wrong ---------------------------------------------------------------------


@contextmanager
def _explained(client: Client, repo_id: str, revision: str | None, repo_type: str) -> Iterator[None]:
    """Turn what the client raises into errors that say what happened and what to do; leave those of the disk."""
    try:
        yield
    except LoadError:
        raise
    except errors.GatedRepoError as error:
        raise LoadError(
            f"access to it is gated: ask for it at {constants.ENDPOINT}/{repo_id}, and log in with `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except errors.DisabledRepoError as error:
        raise LoadError("the Hub has disabled it: ask its publisher, or use another repository") from error
    except errors.RevisionNotFoundError as error:
        raise UnknownError(_no_revision(client, repo_id, str(revision), repo_type)) from error
    except errors.RepositoryNotFoundError as error:
        raise LoadError(
            f"{constants.ENDPOINT} has no such repository, or it is private: check the name, and log in with "
            "`hf auth login` or set HF_TOKEN if you have access"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(error) from error
    except errors.OfflineModeIsEnabled as error:
        raise not_cached("HF_HUB_OFFLINE") from error
    except errors.LocalEntryNotFoundError as error:
        raise UnreachableError(f"the download failed: {_root(error)}. Check the connection, and try again") from error
    except json.JSONDecodeError as error:
        raise UnreachableError(
            f"{constants.ENDPOINT} answered something that is not JSON ({error}), as a login page or proxy does: "
            "open it in a browser, or set HF_ENDPOINT"
        ) from error
    except Exception as error:
        if not _is_network_error(error):
            if _is_wrong_size(error):
                raise UnreachableError(f"the download failed: {error} Try again") from error
            if isinstance(error, OSError):
                raise
            raise LoadError(
                f"the client failed: {type(error).__name__}: {error}. Try again; if it persists, report it"
            ) from error
        raise UnreachableError(
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}): check the network and "
            "HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"
        ) from error


def _http_error(error: errors.HfHubHTTPError) -> LoadError:
    status = error.response.status_code
    if status == 401:
        return LoadError("the Hub does not accept the token (401): log in with `hf auth login`, or mend HF_TOKEN")
    if status == 403:
        return LoadError("the Hub forbids access (403): ask the publisher, or use a token that may read it")
    if status == 404:
        return LoadError("the Hub does not have it (404): check name and revision")
    if status == 429:
        return UnreachableError("the Hub got too many requests (429): wait, or log in with `hf auth login`")
    if status >= 500:
        return UnreachableError(f"the Hub is in trouble ({status}): try again later")
    return LoadError(f"the Hub answered {status}: {error}")


def _no_revision(client: Client, repo_id: str, revision: str, repo_type: str) -> str:
    """Say that a revision does not exist, and which do, where the Hub tells."""
    try:
        refs = client._api().list_repo_refs(repo_id, repo_type=repo_type)
    except Exception as error:  # the question was another one: answer that, and say what is not known
        return f"it has no revision {revision!r} (which exist could not be asked: {type(error).__name__})"
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    versions = sorted(int(n[1:]) for n in names if n[:1] == "v" and n[1:].isdigit())
    if revision[:1] == "v" and revision[1:].isdigit():
        existing = ", ".join(map(str, versions)) or "none"
        return f"it has no version {revision[1:]}: versions that exist are {existing}"
    return f"it has no revision {revision!r}: branches and tags are {', '.join(names) or 'none'}"


def not_cached(silence: str) -> AbsentError:
    """Return the error for what is not there, and may not be asked for."""
    return AbsentError(f"it is not in the cache, and {silence} is set: load it once online, or unset that")


def _is_network_error(error: BaseException) -> bool:
    """Whether an exception comes from the transport: its classes differ between versions of the client."""
    transport = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    return isinstance(error, transport) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore")


def _is_wrong_size(error: BaseException) -> bool:
    """Whether the client says that a file is shorter or longer than announced: a bare OSError, with no errno."""
    return type(error) is OSError and error.errno is None


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
