"""The responses of a local Hub to requests: the routes, the status codes and the headers of the real one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .repositories import Commit, Repositories, Repository, RepoType, git_blob_id

_KINDS: dict[str, RepoType] = {"kernels": "kernel", "models": "model", "datasets": "dataset", "spaces": "space"}
Query = dict[str, list[str]]
_DATE = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """One request as it came in: `path` is undecoded and has the query, header names are lower case.

    `status` is that of the response, 0 while there is none yet and when the connection was dropped.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    status: int = 0

    def matches(self, pattern: Pattern) -> bool:
        """Match a text in, or a regular expression on, `"METHOD /decoded/path?query"`, or ask a function.

        Example:
            >>> Request("GET", "/api/kernels/acme/kernels/revision/a%2Fb", {}).matches("GET /api")
            True
        """
        line = f"{self.method} {unquote(self.path)}"
        if isinstance(pattern, str):
            return pattern in line
        return bool(pattern.search(line)) if isinstance(pattern, re.Pattern) else pattern(self)


Pattern = str | re.Pattern[str] | Callable[[Request], bool]


@dataclass(frozen=True)
class Response:
    """One HTTP response; `sent` is how much of the body leaves before the connection is closed, None for all."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None


class RefusedError(Exception):
    """A request that the Hub refuses, with the code and the message that the client looks for."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Keep the response: the code and message travel as headers, the message also as JSON."""
        super().__init__(message)
        named = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        named.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.response = json_response({"error": message}, status, named)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with `value` as JSON."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Response(status, json.dumps(value).encode(), {**kind, **(headers or {})})


class Router(Repositories):
    """Repositories and organizations, and the responses to requests for them."""

    token = "hf_local_member"
    stranger_token = "hf_local_stranger"
    page_size = 1000
    lfs_threshold: int | None = None

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self.organizations: dict[str, bool] = {}

    def organization(self, name: str, *, trusted: bool) -> None:
        """Add an organisation, as a trusted publisher of kernels or as any other."""
        self.organizations[name] = trusted

    def respond(self, request: Request, body: bytes = b"") -> Response:
        """Return the response to one request."""
        try:
            return self._route(request, body)
        except RefusedError as refusal:
            return refusal.response

    def _route(self, request: Request, body: bytes) -> Response:
        url, headers = urlsplit(request.path), request.headers
        query = parse_qs(body.decode() if request.method == "POST" else url.query)
        user = self._user(headers)
        # Segments are cut before they are decoded: a branch named a/b travels as a%2Fb.
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match parts:
            case ["api", "whoami-v2"]:
                return _whoami(user)
            case ["api", "agent-harnesses"]:  # newer clients ask once a day, unless telemetry is switched off
                return json_response({"standardEnvVars": ["AI_AGENT", "AGENT"], "harnesses": {}})
            case ["api", "organizations", name, "overview"]:
                return self._organization(name)
            case ["api", kinds, owner, name, *rest] if kinds in _KINDS:
                repository = self._readable(_KINDS[kinds], f"{owner}/{name}", request.path, user)
                return self._api(repository, rest, query, f"http://{headers.get('host', '')}{url.path}")
        # The files of models have an address without a kind.
        kind = _KINDS.get(parts[0], "model")
        parts = parts[1:] if parts[0] in _KINDS else parts
        if len(parts) >= 5 and parts[2] == "resolve":
            repository = self._readable(kind, "/".join(parts[:2]), request.path, user)
            return self._file(repository, parts[3], "/".join(parts[4:]), headers, user)
        raise RefusedError(404, "Sorry, we can't find the page you are looking for.")

    def _user(self, headers: Mapping[str, str]) -> str | None:
        authorization = headers.get("authorization")
        if authorization is None:
            return None
        names = {f"Bearer {self.token}": "member", f"Bearer {self.stranger_token}": "stranger"}
        if authorization not in names:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return names[authorization]

    def _organization(self, name: str) -> Response:
        if name not in self.organizations:
            raise RefusedError(404, "This organization does not exist")
        trusted = self.organizations[name]
        overview = {"name": name, "fullname": name, "avatarUrl": "", "isVerified": trusted, "numUsers": 1}
        return json_response({**overview, "trustedKernelPublisher": trusted})

    def _readable(self, kind: RepoType, repo_id: str, target: str, user: str | None) -> Repository:
        """Return a repository that the user may know of; refuse or redirect the request else."""
        repository = self.repository(repo_id, repo_type=kind)
        new_id = None if repository else self._moved.get((kind, repo_id))
        if new_id is not None:
            location = target.replace(quote(repo_id), quote(new_id), 1)
            raise RefusedError(307, f"Temporary Redirect. Redirecting to {location}", Location=location)
        if repository is None or (repository.private and user != "member"):
            if user is None:  # The real Hub does not reveal to a visitor which private repositories exist.
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if repository.disabled:
            raise RefusedError(403, "Access to this resource is disabled.")
        return repository

    def _api(self, repository: Repository, rest: list[str], query: Query, page: str) -> Response:
        if rest == ["refs"]:
            return json_response(_refs(repository))
        verb, revision = [*rest, "main"][:2] if rest else ("revision", "main")
        commit = _commit(repository, revision)
        if verb == "revision":
            return json_response(self._info(repository, commit, blobs="blobs" in query))
        if verb == "tree":
            return self._tree(commit, "/".join(rest[2:]), revision, query, page)
        if verb == "paths-info":
            wanted = set(query.get("paths", []))
            return json_response([entry for entry in self._entries(commit) if entry["path"] in wanted])
        raise RefusedError(404, "Sorry, we can't find the page you are looking for.")

    def _info(self, repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
        info: dict[str, Any] = {
            "_id": git_blob_id(repository.id.encode())[:24],
            "id": repository.id,
            "author": repository.id.split("/")[0],
            "sha": commit.id,
            "gated": "manual" if repository.gated else False,
            **dict.fromkeys(("lastModified", "createdAt"), _DATE),
            **dict.fromkeys(("downloads", "likes"), 0),
            "tags": [],
            "private": repository.private,
            "disabled": repository.disabled,
        }
        if repository.repo_type != "kernel":  # Kernel repositories do not list their files here.
            files = [entry for entry in self._entries(commit) if entry["type"] == "file"]
            info["siblings"] = [_sibling(entry) if blobs else {"rfilename": entry["path"]} for entry in files]
        return info

    def _tree(self, commit: Commit, folder: str, revision: str, query: Query, page: str) -> Response:
        if folder and folder not in commit.folders():
            raise RefusedError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        inside = f"{folder}/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [
            entry
            for entry in self._entries(commit)
            if entry["path"].startswith(inside) and (recursive or "/" not in entry["path"][len(inside) :])
        ]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.page_size
        headers = {}
        if end < len(entries):
            headers["Link"] = f'<{page}?recursive={str(recursive).lower()}&cursor={end}>; rel="next"'
        return json_response(entries[start:end], headers=headers)

    def _entries(self, commit: Commit) -> list[dict[str, Any]]:
        entries = [
            {"type": "directory", "oid": git_blob_id(path.encode()), "size": 0, "path": path}
            for path in commit.folders()
        ]
        for path, data in commit.files.items():
            entry: dict[str, Any] = {"type": "file", "oid": git_blob_id(data), "size": len(data), "path": path}
            if self._is_large(data):
                # Git has a large file's pointer in place of its bytes.
                sha256 = hashlib.sha256(data).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
                entry["oid"] = git_blob_id(pointer.encode())
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
            entries.append(entry)
        return sorted(entries, key=lambda entry: str(entry["path"]))

    def _is_large(self, data: bytes) -> bool:
        return self.lfs_threshold is not None and len(data) >= self.lfs_threshold

    def _file(
        self, repository: Repository, revision: str, path: str, headers: Mapping[str, str], user: str | None
    ) -> Response:
        if repository.gated and user != "member":
            # As on the real Hub, the name and the list of files of a gated repository are public; its files are not.
            status = 401 if user is None else 403
            raise RefusedError(status, f"Access to {repository.id} is restricted.", "GatedRepo")
        commit = _commit(repository, revision)
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        data = commit.files[path]
        named = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "ETag": f'"{git_blob_id(data)}"'}
        if self._is_large(data):
            named["ETag"] = named["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            named["X-Linked-Size"] = str(len(data))
        return _ranged(data, headers.get("range", ""), {"Content-Type": "application/octet-stream", **named})


def _whoami(user: str | None) -> Response:
    if user is None:
        raise RefusedError(401, "Invalid username or password.")
    access = {"displayName": "local", "role": "read"}
    auth = {"type": "access_token", "accessToken": access}
    return json_response({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})


def _refs(repository: Repository) -> dict[str, list[dict[str, str]]]:
    branches, tags = (
        [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": known[name]} for name in sorted(known)]
        for kind, known in (("heads", repository.branches), ("tags", repository.tags))
    )
    return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}


def _commit(repository: Repository, revision: str) -> Commit:
    try:
        return repository.at(revision)
    except KeyError as error:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from error


def _sibling(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of a tree as the info of a model has it: the same facts by other names."""
    sibling = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        lfs = dict(entry["lfs"])
        sibling["lfs"] = {"sha256": lfs.pop("oid"), **lfs}
    return sibling


def _ranged(data: bytes, wanted: str, headers: Mapping[str, str]) -> Response:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or not any(match.groups()):
        return Response(200, data, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        raise RefusedError(416, "Range Not Satisfiable", Content_Range=f"bytes */{len(data)}")
    part = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return Response(206, data[start : end + 1], part)
