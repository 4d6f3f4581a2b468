"""A Hugging Face Hub on this machine: real sockets, the real client, and faults on demand.

    >>> from huggingface_hub import HfApi
    >>> with LocalHub() as hub:
    ...     repository = hub.add("acme/kernels", {"README.md": "hello"})
    ...     HfApi(endpoint=hub.url).kernel_info("acme/kernels").sha == repository.head()
    True

The client reads `HF_ENDPOINT`, `HF_HOME` and the rest of its environment once, when it is imported. A
process that is still to start is pointed here with `LocalHub.environment`. In a running one, either pass
`endpoint=hub.url` and `cache_dir=...` (to `HfApi`, `snapshot_download`, `hf_hub_download`), or use the
`local_hub` fixture of `kernels_plugins.hub.testing`, which replaces the values the client has read.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .faults import Fault
from .repositories import Repository
from .routes import Pattern, Request, Response, Router, json_response

__all__ = ["LocalHub", "Repository", "Request"]


class LocalHub(Router):
    """A Hub that serves repositories added by call and the `<owner>/<name>` folders of a directory.

    Attributes:
        token: a token that may read everything.
        stranger_token: a valid token that may read neither private repositories nor gated files.
        page_size: the number of entries on one page of a tree.
        lfs_threshold: the size in bytes from which files are served as large ones; None for never.

    Example:
        >>> with LocalHub() as hub:
        ...     _ = hub.add("acme/kernels", {"build/torch-universal/__init__.py": ""})
        ...     hub.fail("HEAD /kernels/acme", status=500)
    """

    def __init__(self, directory: Path | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Prepare a Hub; it listens from `start()`, or from entering it as a context manager."""
        super().__init__(directory)
        self._address = (host, port)
        # Threads of the server share these lists; Python appends, copies and clears them as one step each.
        self._faults: list[Fault] = []
        self._log: list[Request] = []
        self._stopping = threading.Event()
        self._server: _Server | None = None

    def start(self) -> LocalHub:
        """Listen, and answer requests in threads of their own."""
        if self._server is not None:
            raise RuntimeError("this Hub is already running")
        self._stopping.clear()
        self._server = _Server(self._address, self)
        # Keep the port: a Hub that is stopped and started again is the same Hub to its clients.
        self._address = (self._address[0], self._server.server_address[1])
        # 0.02: how long a stop waits.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port and every open connection; a Hub that does not run stays as it is."""
        server, self._server = self._server, None
        self._stopping.set()
        if server is not None:
            server.shutdown()
            server.server_close()
            server.hang_up()

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the Hub listens, with no slash at the end."""
        if self._address[1] == 0:
            raise RuntimeError("a Hub has a url once it was started")
        return f"http://{self._address[0]}:{self._address[1]}"

    def fail(
        self,
        match: Pattern,
        *,
        status: int | None = None,
        truncate: int | None = None,
        flip: int | None = None,
        delay: float | None = None,
        drop: bool = False,
        body: bytes | str | None = None,
        content_type: str | None = None,
        headers: Mapping[str, str | None] | None = None,
        times: int | None = 1,
    ) -> None:
        """Apply a fault to the next `times` requests that match; None is to all. See `Request.matches`.

        Args:
            match: a text, a regular expression or a function that picks the requests.
            status: answer with this status and a JSON error.
            truncate: promise the whole body and hang up after this many bytes of it.
            flip: invert the byte at this offset of the body.
            delay: wait this many seconds before answering.
            drop: hang up without a response.
            body: answer with this, by default as an HTML page with status 200.
            content_type: replaces the content type.
            headers: headers to set, or, where the value is None, to leave out.
            times: how many requests this happens to.
        """
        fault = Fault(match, status, truncate, flip, delay, drop, body, content_type, headers, times)
        self._faults.append(fault)

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    @property
    def requests(self) -> list[Request]:
        """The requests so far, oldest first."""
        return self._log.copy()

    def forget(self) -> None:
        """Empty the list of requests."""
        self._log.clear()

    def count(self, pattern: Pattern | None = None) -> int:
        """Count the requests that match, or all of them. See `Request.matches`."""
        return sum(pattern is None or request.matches(pattern) for request in self.requests)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that point the client of a new process here, with its cache under `home`.

        Every location is named, so that nothing inherited from this process's environment wins.

        Example:
            >>> with LocalHub() as hub:
            ...     hub.environment(Path("/tmp/home"))["HF_HUB_CACHE"]
            '/tmp/home/hub'
        """
        home_of = {"HF_HOME": "", "HF_ASSETS_CACHE": "assets", "HF_XET_CACHE": "xet", "HF_TOKEN_PATH": "token"}
        home_of |= dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), "hub")
        # The client takes an empty token for none at all.
        tokens = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"), "")
        off = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        on = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
        direct = f"{self._address[0]},127.0.0.1,localhost"
        return {
            "HF_ENDPOINT": self.url,
            **{variable: str(home / name) for variable, name in home_of.items()},
            **tokens,
            **{f"HF_HUB_DISABLE_{name}": "1" for name in off},
            **dict.fromkeys(on, "0"),
            # A proxy of the machine must not come between the client and this Hub.
            **dict.fromkeys(("NO_PROXY", "no_proxy"), direct),
        }

    def _answer(self, request: Request, body: bytes) -> Response | None:
        """Return the response to a request with its fault, if it has one; None is to close the connection."""
        response: Response | None = self.respond(request, body)
        with self._lock:  # two requests at once must not share the last of a fault's times
            fault = next((fault for fault in self._faults if fault.concerns(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
        if fault is not None and response is not None:
            self._stopping.wait(fault.delay or 0)  # rather than sleep: a stop of the Hub ends it
            response = None if fault.drop else fault.apply(response)
        # Noted before it is sent: a client that has its response finds its request here.
        self._log.append(replace(request, status=0 if response is None else response.status))
        return response


class _Handler(BaseHTTPRequestHandler):
    """Reads requests off one connection and writes the answers of the Hub."""

    protocol_version = "HTTP/1.1"
    # Headers and body leave together: written apart, they wait for each other's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def _reply(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        try:
            response = self.server.hub._answer(Request(self.command, self.path, headers), body)
        except Exception:
            # A fault of this server, or of a test's own match function: the client shows it.
            response = json_response({"error": traceback.format_exc()}, 500)
        if response is None:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.sent])
            self.close_connection = self.close_connection or response.sent is not None

    do_GET = do_HEAD = do_POST = _reply  # noqa: N815 (names that http.server looks for)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; the Hub keeps its own list of requests."""


class _Server(ThreadingHTTPServer):
    """Knows its open connections, so that it need not wait for clients to close them."""

    daemon_threads = True
    request_queue_size = 128  # a client that downloads opens many at once

    def __init__(self, address: tuple[str, int], hub: LocalHub) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        self._connections.add(connection)
        return connection, client

    def hang_up(self) -> None:
        """Close all connections; the threads that read from them then end."""
        for connection in list(self._connections):  # of a server that accepts no more of them
            with contextlib.suppress(OSError):  # The client, or our thread, closed it first.
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error to standard error, unless it is only that the client left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
