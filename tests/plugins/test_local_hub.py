"""The local Hub, through the real `huggingface_hub` client and over real sockets."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from fresh_process import run_python
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from patience import PATIENCE

from kernels_plugins.local_hub.server import LocalHub, Repository, Request

pytest_plugins = ["kernels_plugins.hub.testing"]

LAYERS = "build/torch-universal/layers.py"


@pytest.fixture
def api(local_hub: LocalHub) -> HfApi:
    """Build a client of the local Hub that found its endpoint by itself."""
    api = HfApi()
    assert api.endpoint == local_hub.url
    return api


@pytest.fixture
def kernels(local_hub: LocalHub) -> Repository:
    """Put one kernel repository with two files on the Hub."""
    return local_hub.add("acme/kernels", {LAYERS: "class Silu: ...\n", "README.md": "hello"})


def fetch(local_hub: LocalHub, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one plain request, for answers that the client does not show."""
    connection = http.client.HTTPConnection(urlsplit(local_hub.url).netloc, timeout=PATIENCE)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def download(filename: str = LAYERS, **options: Any) -> str:
    """Download one file of the kernel repository and return its text."""
    path = hf_hub_download("acme/kernels", filename, repo_type="kernel", **options)
    return Path(str(path)).read_text()


# Repositories


def test_repository_info(api: HfApi, kernels: Repository) -> None:
    """The client reads the id and the head of main of a kernel repository."""
    info = api.kernel_info("acme/kernels")
    assert (info.id, info.author, info.sha, info.private) == ("acme/kernels", "acme", kernels.head(), False)


@pytest.mark.parametrize("repo_type", ["kernel", "model", "dataset", "space"])
def test_repository_types(api: HfApi, local_hub: LocalHub, repo_type: Any) -> None:
    """Every repository type is served under its own addresses, and only there."""
    repository = local_hub.add("acme/thing", {"a.txt": "a"}, repo_type=repo_type)
    assert api.repo_info("acme/thing", repo_type=repo_type).sha == repository.head()
    path = hf_hub_download("acme/thing", "a.txt", repo_type=repo_type)
    assert Path(str(path)).read_text() == "a"
    other = "model" if repo_type == "kernel" else "kernel"
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("acme/thing", repo_type=other)


def test_model_lists_files(api: HfApi, local_hub: LocalHub) -> None:
    """Models, unlike kernels, list their files in their info, with sizes on request."""
    local_hub.add("acme/model", {"a.txt": "aaa"}, repo_type="model")
    siblings = api.model_info("acme/model", files_metadata=True).siblings or []
    assert [(file.rfilename, file.size) for file in siblings] == [("a.txt", 3)]
    assert huggingface_hub.model_info("acme/model").id == "acme/model"


@pytest.mark.parametrize("shape", ["branch", "full branch", "tag", "full tag", "commit", "short commit"])
def test_revisions(api: HfApi, kernels: Repository, shape: str) -> None:
    """A branch with a slash, a tag, a commit and the first digits of one all name the old tree."""
    old = kernels.branch("releases/v1")
    kernels.tag("1.0")
    new = kernels.commit({LAYERS: "class Gelu: ...\n"})
    names = {"branch": "releases/v1", "tag": "1.0", "commit": old, "short commit": old[:7]}
    names |= {"full branch": "refs/heads/releases/v1", "full tag": "refs/tags/1.0"}
    revision = names[shape]
    assert api.kernel_info("acme/kernels", revision=revision).sha == old != new
    assert download(revision=revision) == "class Silu: ...\n"
    assert download() == "class Gelu: ...\n"


def test_refs(api: HfApi, kernels: Repository) -> None:
    """Branches and tags are listed with the commits they name."""
    first = kernels.tag("1.0")
    kernels.branch("v1")
    second = kernels.commit({"README.md": "more"})
    refs = api.list_repo_refs("acme/kernels", repo_type="kernel")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "v1": first}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("1.0", "refs/tags/1.0", first)]


def test_commit_names_contents_and_parent(local_hub: LocalHub) -> None:
    """The same history gives the same 40 digits; other contents or another parent give others."""
    one, two = local_hub.add("acme/one", {"a": "1"}), local_hub.add("acme/two", {"a": "1"})
    assert one.head() == two.head() and re.fullmatch("[0-9a-f]{40}", one.head())
    assert one.commit({"a": "2"}) == two.commit({"a": "2"}) != one.commit({"a": "2"})


def test_served_directory(api: HfApi, tmp_path: Path, local_hub: LocalHub) -> None:
    """A folder is a repository whose commit follows from its bytes, back and forth with every edit."""
    layers = tmp_path / "hub-served" / "acme" / "folder" / LAYERS
    layers.parent.mkdir(parents=True)
    layers.write_text("one")
    first = api.kernel_info("acme/folder").sha
    layers.write_text("two")
    assert api.kernel_info("acme/folder").sha != first
    assert Path(str(hf_hub_download("acme/folder", LAYERS, repo_type="kernel"))).read_text() == "two"
    layers.write_text("one")
    assert api.kernel_info("acme/folder").sha == first


@pytest.mark.parametrize("path", ["../secret", "acme%2F..%2F..", "..", "acme/.."])
def test_served_directory_is_all_there_is(local_hub: LocalHub, tmp_path: Path, path: str) -> None:
    """No address leads out of the served directory."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret")
    (tmp_path / "hub-served" / "acme").mkdir()
    response, body = fetch(local_hub, f"/kernels/{path}/resolve/main/a.txt")
    assert response.status in (401, 404) and b"secret" not in body


def test_add_from_folder(api: HfApi, local_hub: LocalHub, tmp_path: Path) -> None:
    """A folder can be copied onto the Hub, and a taken id is refused."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "a.bin").write_bytes(b"\0\xff")
    repository = local_hub.add("acme/copy", tmp_path / "tree", branch="main")
    assert dict(repository.files()) == {"deep/a.bin": b"\0\xff"}
    with pytest.raises(ValueError, match="already"):
        local_hub.add("acme/copy", {})


def test_rename(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """The old id of a renamed repository leads to the new one, for info, listing and files."""
    local_hub.rename("acme/kernels", "acme/layers")
    assert api.kernel_info("acme/kernels").id == "acme/layers"
    listed = api.list_repo_tree("acme/kernels", repo_type="kernel", recursive=True)
    assert LAYERS in [entry.path for entry in listed]
    assert download() == "class Silu: ...\n"
    response, _ = fetch(local_hub, "/api/kernels/acme/kernels/tree/main?recursive=true")
    moved = "/api/kernels/acme/layers/tree/main?recursive=true"
    assert (response.status, response.headers["Location"]) == (307, moved)
    local_hub.rename("acme/layers", "other/third")
    assert api.kernel_info("acme/kernels").id == "other/third"
    with pytest.raises(KeyError):
        local_hub.rename("acme/none", "acme/new")


def test_rename_served_folder(api: HfApi, local_hub: LocalHub, tmp_path: Path) -> None:
    """A renamed folder repository does not come back under its old id."""
    (tmp_path / "hub-served" / "acme" / "folder").mkdir(parents=True)
    local_hub.rename("acme/folder", "acme/new")
    assert api.kernel_info("acme/folder").id == "acme/new"


# Trees and files


def test_tree(api: HfApi, kernels: Repository) -> None:
    """A listing has files and folders, of the whole tree or of one level of one folder."""
    everything = api.list_repo_tree("acme/kernels", repo_type="kernel", recursive=True)
    assert [entry.path for entry in everything] == ["README.md", "build", "build/torch-universal", LAYERS]
    level = list(api.list_repo_tree("acme/kernels", "build", repo_type="kernel"))
    assert [(type(entry).__name__, entry.path) for entry in level] == [("RepoFolder", "build/torch-universal")]
    nested = api.list_repo_tree("acme/kernels", "build/torch-universal", repo_type="kernel")
    assert [entry.path for entry in nested] == [LAYERS]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("acme/kernels", "nowhere", repo_type="kernel"))


def test_tree_pages(api: HfApi, local_hub: LocalHub) -> None:
    """The client follows the links between the pages of a long listing."""
    local_hub.add("acme/many", {f"{number}.txt": "" for number in range(5)})
    local_hub.page_size = 2
    listed = list(api.list_repo_tree("acme/many", repo_type="kernel", recursive=True))
    assert [entry.path for entry in listed] == [f"{number}.txt" for number in range(5)]
    assert local_hub.count("/tree/main") == 3
    snapshot = snapshot_download("acme/many", repo_type="kernel")
    assert len(os.listdir(snapshot)) == 5


def test_paths_info(api: HfApi, kernels: Repository) -> None:
    """Asked about some paths, the Hub describes those that exist."""
    infos = api.get_paths_info("acme/kernels", [LAYERS, "build", "nowhere"], repo_type="kernel")
    assert [(type(info).__name__, info.path) for info in infos] == [
        ("RepoFolder", "build"),
        ("RepoFile", LAYERS),
    ]


def test_file_headers(local_hub: LocalHub, kernels: Repository) -> None:
    """A file comes with its commit, its size and git's name for its bytes."""
    response, body = fetch(local_hub, "/kernels/acme/kernels/resolve/main/README.md")
    assert body == b"hello"
    assert response.headers["X-Repo-Commit"] == kernels.head()
    assert response.headers["ETag"] == '"b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"'
    assert response.headers["Content-Length"] == "5"


def test_large_files(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """From the threshold on, a file is named by its sha256 in headers, listings and the cache."""
    local_hub.lfs_threshold = 10
    data = b"class Silu: ...\n"
    sha256 = hashlib.sha256(data).hexdigest()
    response, _ = fetch(local_hub, f"/kernels/acme/kernels/resolve/main/{LAYERS}")
    assert response.headers["X-Linked-Etag"] == f'"{sha256}"'
    assert response.headers["X-Linked-Size"] == str(len(data))
    (entry,) = api.get_paths_info("acme/kernels", LAYERS, repo_type="kernel")
    assert isinstance(entry, huggingface_hub.hf_api.RepoFile) and entry.lfs is not None
    assert (entry.lfs.sha256, entry.lfs.size) == (sha256, len(data))
    assert download() == data.decode()
    blobs = Path(constants.HF_HUB_CACHE) / "kernels--acme--kernels" / "blobs"
    assert [blob.name for blob in blobs.iterdir()] == [sha256]


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [("bytes=1-2", 206, b"el"), ("bytes=3-", 206, b"lo"), ("bytes=-2", 206, b"lo"), ("bytes=9-", 416, None)],
)
def test_ranges(local_hub: LocalHub, kernels: Repository, wanted: str, status: int, part: bytes | None) -> None:
    """A part of a file is served as such, and one past its end is refused with its size."""
    response, body = fetch(local_hub, "/kernels/acme/kernels/resolve/main/README.md", Range=wanted)
    assert response.status == status
    assert response.headers["Content-Range"].endswith("/5")
    assert part is None or body == part


def test_snapshot_and_cache(local_hub: LocalHub, kernels: Repository) -> None:
    """A snapshot is downloaded once; the next one of the same commit transfers no file again."""
    first = snapshot_download("acme/kernels", repo_type="kernel", allow_patterns=["build/*"])
    assert (Path(first) / LAYERS).read_text() == "class Silu: ...\n"
    assert not (Path(first) / "README.md").exists()
    assert Path(first).name == kernels.head()
    local_hub.forget()
    assert snapshot_download("acme/kernels", repo_type="kernel", allow_patterns=["build/*"]) == first
    assert local_hub.count("GET /kernels/") == 0


def test_pinned_file_needs_no_request(local_hub: LocalHub, kernels: Repository) -> None:
    """A cached file of a full commit is found without asking the Hub."""
    download(revision=kernels.head())
    local_hub.forget()
    download(revision=kernels.head())
    assert local_hub.requests == []


# Who may read what


@pytest.mark.parametrize("what", ["info", "file"])
def test_private(api: HfApi, local_hub: LocalHub, what: str) -> None:
    """A private repository does not exist for a visitor or a stranger, and does for a member."""
    local_hub.add("acme/kernels", {LAYERS: "secret"}, private=True)

    def read(token: str | bool) -> object:
        return api.kernel_info("acme/kernels", token=token) if what == "info" else download(token=token)

    for token, status in ((False, 401), (local_hub.stranger_token, 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            read(token)
        assert caught.value.response.status_code == status
    assert read(local_hub.token)


def test_gated(api: HfApi, local_hub: LocalHub) -> None:
    """A gated repository can be looked up by all, its files only be read by a member."""
    local_hub.add("acme/kernels", {LAYERS: "gated"}, gated=True)
    assert api.kernel_info("acme/kernels").gated == "manual"
    for token, status in ((False, 401), (local_hub.stranger_token, 403)):
        with pytest.raises(GatedRepoError) as caught:
            download(token=token)
        assert caught.value.response.status_code == status
    assert download(token=local_hub.token) == "gated"


def test_disabled(api: HfApi, local_hub: LocalHub) -> None:
    """A disabled repository is refused as such, member or not."""
    local_hub.add("acme/kernels", {LAYERS: "gone"}, disabled=True)
    with pytest.raises(DisabledRepoError):
        api.kernel_info("acme/kernels", token=local_hub.token)


def test_whoami(api: HfApi, local_hub: LocalHub) -> None:
    """A token has an owner; an invented one is invalid, everywhere."""
    assert api.whoami(token=local_hub.token)["name"] == "member"
    assert api.whoami(token=local_hub.stranger_token)["name"] == "stranger"
    for call in (lambda: api.whoami(token="hf_no"), lambda: api.kernel_info("acme/kernels", token="hf_no")):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)


def test_unknown_names(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """An unknown repository, revision and file each raise the error the client has for it."""
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.kernel_info("acme/none")
    assert caught.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.kernel_info("acme/none", token=local_hub.token)
    assert caught.value.response.status_code == 404
    with pytest.raises(RevisionNotFoundError):
        api.kernel_info("acme/kernels", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        download(revision="v9")
    with pytest.raises(EntryNotFoundError):
        download("nowhere.py")
    missing = Path(constants.HF_HUB_CACHE) / "kernels--acme--kernels" / ".no_exist" / kernels.head()
    assert (missing / "nowhere.py").exists()


def test_organizations(api: HfApi, local_hub: LocalHub) -> None:
    """An organisation says whether it is a trusted publisher of kernels; an unknown one is not found."""
    local_hub.organization("acme", trusted=True)
    local_hub.organization("other", trusted=False)
    for name, trusted in (("acme", True), ("other", False)):
        overview = vars(api.get_organization_overview(name))
        assert (overview["name"], overview["trustedKernelPublisher"]) == (name, trusted)
    with pytest.raises(HfHubHTTPError) as caught:
        api.get_organization_overview("nobody")
    assert caught.value.response.status_code == 404


# Faults


def test_error_status_once(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """One error answer hits one request, and the next one is right again."""
    local_hub.fail("GET /api/kernels", status=500)
    with pytest.raises(HfHubHTTPError):
        api.kernel_info("acme/kernels")
    assert api.kernel_info("acme/kernels").sha == kernels.head()
    assert [request.status for request in local_hub.requests] == [500, 200]


def test_error_status_is_retried(local_hub: LocalHub, kernels: Repository) -> None:
    """The client's own retries see the Hub recover, and do not slow the test down."""
    local_hub.fail("HEAD /kernels", status=429, headers={"Retry-After": "30"}, times=3)
    started = time.monotonic()
    assert download() == "class Silu: ...\n"
    assert local_hub.count(lambda request: request.status == 429) == 3
    assert time.monotonic() - started < 30  # not 90, as the Hub asks


def test_error_status_for_ever_and_heal(local_hub: LocalHub, kernels: Repository) -> None:
    """A lasting error outlives all retries, until the Hub is healed."""
    local_hub.fail(re.compile("^HEAD .*/resolve/"), status=503, times=None)
    with pytest.raises((LocalEntryNotFoundError, HfHubHTTPError)):
        download()
    local_hub.heal()
    assert download() == "class Silu: ...\n"


def test_lasting_error_with_cache(local_hub: LocalHub, kernels: Repository) -> None:
    """Files that were downloaded before stay usable while the Hub is down."""
    snapshot = snapshot_download("acme/kernels", repo_type="kernel")
    local_hub.fail("", status=500, times=None)
    assert snapshot_download("acme/kernels", repo_type="kernel") == snapshot


def test_truncated_body(local_hub: LocalHub, kernels: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body cut short is never taken for the file; the client gets the rest by a range request."""
    # The client keeps whole chunks only: by default, the first ten megabytes or nothing.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5)
    local_hub.fail("/resolve/", truncate=5)
    try:
        text = download()
    except Exception as error:  # Older clients give up here, and go on from what they have at the next call.
        assert "peer closed connection" in str(error)
        text = download()
    assert text == "class Silu: ...\n"
    ranges = [request.headers.get("range") for request in local_hub.requests if request.method == "GET"]
    assert ranges == [None, "bytes=5-"]


def test_flipped_byte(local_hub: LocalHub, kernels: Repository) -> None:
    """One wrong byte of the right length passes the client, which compares sizes only."""
    local_hub.fail(LAYERS, flip=0)
    path = hf_hub_download("acme/kernels", LAYERS, repo_type="kernel")
    assert Path(str(path)).read_bytes() == b"\x9class Silu: ...\n"


def test_slow_answer(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """A late answer runs into the client's time limit, or arrives if there is time."""
    local_hub.fail("GET /api", delay=1, times=2)
    with pytest.raises(Exception, match="timed out"):
        api.kernel_info("acme/kernels", timeout=0.1)
    started = time.monotonic()
    assert api.kernel_info("acme/kernels").sha == kernels.head()
    assert time.monotonic() - started > 0.9


def test_dropped_connection(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """A connection closed without an answer is a transport error, noted with no status."""
    local_hub.fail("GET /api", drop=True)
    with pytest.raises(Exception, match="disconnected without sending a response"):
        api.kernel_info("acme/kernels")
    assert [request.status for request in local_hub.requests] == [0]


def test_login_page(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """A login page in place of JSON, as networks with a portal send it, is no answer."""
    local_hub.fail("/api/", body="<html>Log in</html>")
    with pytest.raises(json.JSONDecodeError):
        api.kernel_info("acme/kernels")
    local_hub.fail("/api/", body="[]", content_type="application/json", status=200)
    response, body = fetch(local_hub, "/api/kernels/acme/kernels")
    assert (response.headers["Content-Type"], body) == ("application/json", b"[]")


def test_missing_commit_header(local_hub: LocalHub, kernels: Repository) -> None:
    """An answer that does not name its commit is not accepted as one of a Hub."""
    local_hub.fail("HEAD", headers={"x-repo-commit": None}, times=None)
    with pytest.raises(LocalEntryNotFoundError):
        download()


def test_fault_by_function(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """A function picks its requests by anything it knows of them; its own mistake is reported."""
    local_hub.fail(lambda request: "authorization" in request.headers, status=418)
    assert api.kernel_info("acme/kernels").sha == kernels.head()
    with pytest.raises(HfHubHTTPError, match="418"):
        api.kernel_info("acme/kernels", token=local_hub.token)
    local_hub.fail(lambda request: bool(1 / 0), status=500)
    with pytest.raises(HfHubHTTPError, match="ZeroDivisionError"):
        api.kernel_info("acme/kernels")


# The server itself


def test_request_log(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """Requests are kept in order with their answers, and can be counted and cleared."""
    api.kernel_info("acme/kernels")
    with pytest.raises(RevisionNotFoundError):
        api.kernel_info("acme/kernels", revision="a/b")
    seen = [(request.method, request.path, request.status) for request in local_hub.requests]
    assert seen == [
        ("GET", "/api/kernels/acme/kernels", 200),
        ("GET", "/api/kernels/acme/kernels/revision/a%2Fb", 404),
    ]
    assert isinstance(local_hub.requests[0], Request)
    assert (local_hub.count(), local_hub.count("revision/a/b"), local_hub.count("POST")) == (2, 1, 0)
    local_hub.forget()
    assert local_hub.count() == 0


def test_keep_alive_and_prompt_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A stop closes idle connections and slow answers at once, and nothing is printed."""
    hub = LocalHub(tmp_path).start()
    address = urlsplit(hub.url)
    assert address.hostname and address.port
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE)
    for _ in range(2):
        connection.request("GET", "/api/whoami-v2")
        connection.getresponse().read()
        assert connection.sock is not None
    hub.fail("", delay=2 * PATIENCE)
    slow = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
    slow.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\n\r\n")
    started = time.monotonic()
    hub.stop()
    hub.stop()
    assert connection.sock.recv(1) == b"" and time.monotonic() - started < PATIENCE
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
    assert capfd.readouterr() == ("", "")
    slow.close()
    connection.close()


def test_stop_and_start_again(api: HfApi, local_hub: LocalHub, kernels: Repository) -> None:
    """A Hub that comes back listens at the same port, with the same repositories."""
    local_hub.stop()
    with pytest.raises(Exception, match=r"[Cc]onnection refused"):
        api.kernel_info("acme/kernels")
    local_hub.start()
    assert api.kernel_info("acme/kernels").sha == kernels.head()
    with pytest.raises(RuntimeError):
        local_hub.start()


def test_many_clients(local_hub: LocalHub, kernels: Repository) -> None:
    """Requests that come at the same time, with commits between them, are all answered."""
    path = "/api/kernels/acme/kernels"
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(fetch, local_hub, path) for _ in range(64)]
        commits = {kernels.head()} | {kernels.commit({LAYERS: str(number)}) for number in range(8)}
        seen = {json.loads(answer.result()[1])["sha"] for answer in answers}
    assert seen <= commits and local_hub.count(path) == 64


# The fixtures


def test_offline_flag(api: HfApi, local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test may take the client offline with the client's own flag; no request leaves then."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        api.kernel_info("acme/kernels")
    assert local_hub.requests == []


def test_other_process(local_hub: LocalHub, kernels: Repository, tmp_path: Path) -> None:
    """A new process with the Hub's environment finds Hub and cache; one from a test does so as well."""
    code = (
        "from huggingface_hub import constants, snapshot_download, get_token;"
        "print(snapshot_download('acme/kernels', repo_type='kernel'), get_token(), constants.HF_HUB_CACHE)"
    )
    environment = {**os.environ, **local_hub.environment(tmp_path / "other")}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    cache = str(tmp_path / "other" / "hub")
    assert printed[0].startswith(cache) and printed[1:] == ["None", cache]
    assert os.environ["HF_ENDPOINT"] == local_hub.url


@pytest.mark.parametrize("digest", [True, False])
def test_kernel_repository(
    api: HfApi, local_hub: LocalHub, kernel_repository: Callable[..., Repository], digest: bool
) -> None:
    """The factory makes a build variant of a trusted owner whose digests are those of its files."""
    kernel_repository(layers="class Silu: ...", digest=digest, metadata={"version": 3, "license": None})
    snapshot = Path(snapshot_download("acme/kernels", repo_type="kernel")) / "build" / "torch-universal"
    metadata = json.loads((snapshot / "metadata.json").read_text())
    assert (metadata["name"], metadata["version"], "license" in metadata) == ("kernels", 3, False)
    assert metadata["backend"] == {"type": "cpu"}
    hashes = {
        path.name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in snapshot.iterdir()
        if path.name != "metadata.json"
    }
    assert hashes.keys() == {"__init__.py", "layers.py"}
    assert metadata.get("digest") == ({"algorithm": "sha256", "files": hashes} if digest else None)
    assert vars(api.get_organization_overview("acme"))["trustedKernelPublisher"]


def test_kernel_repository_files(local_hub: LocalHub, kernel_repository: Callable[..., Repository]) -> None:
    """The factory takes files, a variant and a stranger for an owner, and commits anew to a known id."""
    files = {
        "layers.py": "",
        "sub/x.so": b"\x7fELF",
        "__pycache__/x.pyc": b"",
        "metadata.json.sigstore": "{}",
    }
    first = kernel_repository("eve/kernels", files, name="fast-layers", variant="torch-cpu", trusted=False)
    metadata = json.loads(first.files()["build/torch-cpu/metadata.json"])
    assert metadata["name"] == "fast-layers"
    assert sorted(metadata["digest"]["files"]) == ["__init__.py", "layers.py", "sub/x.so"]
    head = first.head()
    assert kernel_repository("eve/kernels", "new", trusted=False) is first
    assert first.head() != head and "build/torch-cpu/layers.py" not in first.files()
    assert not vars(HfApi().get_organization_overview("eve"))["trustedKernelPublisher"]


# --- Import paths --------------------------------------------------------------------------------

PATHS = ("kernels_plugins.hub.testing", "kernels_plugins.local_hub.testing")
TEST_OF_A_PLUGIN = """
def test_fixtures(request, local_hub, kernel_repository):
    kernel_repository("acme/kernels", "class Silu: ...")
    local_hub.fail("/resolve/", status=500)
    find = request.session._fixturemanager.getfixturedefs
    assert [len(find(name, request.node)) for name in ("local_hub", "kernel_repository")] == [1, 1]
"""


@pytest.mark.parametrize("paths", [PATHS[:1], PATHS[1:], PATHS, PATHS[::-1]], ids=",".join)
def test_a_pytest_plugin_by_either_path_gives_the_fixtures_once(paths: tuple[str, ...], tmp_path: Path) -> None:
    """The path of the documentation and the path of the file give the same fixtures; both together, no second ones."""
    (tmp_path / "conftest.py").write_text(f"pytest_plugins = {list(paths)}\n")
    (tmp_path / "test_plugin.py").write_text(TEST_OF_A_PLUGIN)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = run_python(*command, environment=os.environ, folder=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_names_of_the_documented_path() -> None:
    """`kernels_plugins.hub.testing` has every name that the file has, with the fixtures."""
    from kernels_plugins.hub import testing as documented
    from kernels_plugins.local_hub import testing as real

    for name in (*documented.__all__, "local_hub", "kernel_repository"):
        assert getattr(documented, name) is getattr(real, name)
    with pytest.raises(AttributeError):
        documented.nothing_of_that_name  # noqa: B018


def test_nothing_imports_the_local_hub_unasked(kernel_repository: Any, local_hub: LocalHub, tmp_path: Path) -> None:
    """A program that discovers all plugins, loads a kernel and asks for its receipt imports no testing tool."""
    source = "import torch\n\n\nclass Silu(torch.nn.Module):\n    def forward(self, x):\n        return x\n"
    kernel_repository("acme/kernels", source).branch("v1")
    program = (
        "import sys, torch, kernels_core.cli, kernels_plugins\n"
        "from kernels_core import Mode, plugin_manager, receipt, resolve, use_kernel_forward_from_hub\n"
        "from kernels_plugins import LayerRepository, register_kernel_mapping\n"
        "Silu = use_kernel_forward_from_hub('Silu')(type('Silu', (torch.nn.Module,), {'forward': lambda s, x: x}))\n"
        "repository = LayerRepository('acme/kernels', layer_name='Silu', version=1)\n"
        "register_kernel_mapping({'Silu': {'cpu': repository}})\n"
        "assert {'hub', 'demo', 'oracle'} <= set(plugin_manager().plugins())\n"
        "assert not resolve(Silu, device='cpu', mode=Mode.INFERENCE).is_reference\n"
        "receipt(torch.nn.Sequential(Silu()), device='cpu', mode=Mode.INFERENCE)\n"
        "assert [name for name in dir(kernels_plugins) if getattr(kernels_plugins, name, None) is None] == []\n"
        "print([name for name in sys.modules if 'local_hub' in name or name in ('pytest', 'http.server')])\n"
    )
    environment = {**os.environ, **local_hub.environment(tmp_path / "home")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
