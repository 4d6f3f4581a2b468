"""Faults on demand, which a local Hub applies to its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .routes import Pattern, Request, Response, json_response


@dataclass
class Fault:
    """A fault of the next `times` requests that match, of all if None; `LocalHub.fail` describes each kind."""

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
        """Return whether this fault is still due and applies to this request."""
        damages_body = self.truncate is not None or self.flip is not None
        # The response to a HEAD request has no body: this fault waits for one that has.
        is_void = request.method == "HEAD" and damages_body and self.status is None and not self.drop
        return self.times != 0 and not is_void and request.matches(self.match)

    def apply(self, response: Response) -> Response:
        """Put the status, body and headers of this fault in place of the right ones, and damage the body."""
        status, body, headers = response.status, response.body, dict(response.headers)
        if self.status is not None:
            error = json_response({"error": f"fault on demand: {self.status}"})
            status, body, headers = self.status, error.body, dict(error.headers)
        if self.body is not None:
            body = self.body.encode() if isinstance(self.body, str) else self.body
            status, headers = self.status or 200, {"Content-Type": "text/html; charset=utf-8"}
        if self.content_type is not None:
            headers["Content-Type"] = self.content_type
        if self.flip is not None and body:
            at = self.flip % len(body)
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        # Names of headers have no case: one that is set must not stand beside its namesake.
        for name, value in (self.headers or {}).items():
            headers = {known: text for known, text in headers.items() if known.lower() != name.lower()}
            if value is not None:
                headers[name] = value
        return Response(status, body, headers, sent=self.truncate)
