"""Requests as a local Hub saw them, and what it lets go wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from kernels_plugins.local_hub.routes import Answer, as_json


@dataclass(frozen=True)
class Request:
    """One request as it came in: `path` is undecoded and has the query, header names are lower case.

    `status` is what was answered, 0 while that is not known yet and when the connection was dropped.
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


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match (None: with all of them)."""

    match: Pattern
    status: int | None = None
    truncate: int | None = None
    flip: int | None = None
    delay: float | None = None
    drop: bool = False
    body: bytes | str | None = None
    content_type: str | None = None
    headers: Mapping[str, str | None] | None = None
    times: int | None = 1

    def concerns(self, request: Request) -> bool:
        """Tell whether this fault is still due and is about this request."""
        if self.times == 0 or (request.method == "HEAD" and self._is_about_bytes):
            return False
        return request.matches(self.match)

    @property
    def _is_about_bytes(self) -> bool:
        """Whether only the body is damaged, which the answer to a HEAD request does not have."""
        return (self.truncate is not None or self.flip is not None) and self.status is None and not self.drop

    def spoil(self, answer: Answer) -> Answer:
        """Put this fault's status, body and headers in place of the right ones, and flip its byte."""
        body, headers = answer.body, dict(answer.headers)
        if self.status is not None:
            error = as_json({"error": f"fault on demand: {self.status}"})
            body, headers = error.body, dict(error.headers)
        if self.body is not None:
            body = self.body.encode() if isinstance(self.body, str) else self.body
            headers = {"Content-Type": "text/html; charset=utf-8"}
        if self.content_type is not None:
            headers["Content-Type"] = self.content_type
        if self.flip is not None and body:
            damaged = bytearray(body)
            damaged[self.flip % len(body)] ^= 0xFF
            body = bytes(damaged)
        return Answer(self._status(answer), body, _merged(headers, self.headers or {}))

    def _status(self, answer: Answer) -> int:
        if self.status is not None:
            return self.status
        return 200 if self.body is not None else answer.status


def _merged(headers: dict[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    names = {name.lower() for name in changes}
    kept = {name: value for name, value in headers.items() if name.lower() not in names}
    return {**kept, **{name: value for name, value in changes.items() if value is not None}}
