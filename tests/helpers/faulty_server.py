"""A real HTTP server on loopback that honours Range and can be set to fail in the ways servers
do."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FaultyServer:
    """Serves the files of a directory.

    `fault(path, number of the request)` names what goes wrong (see `_Handler._answer`), or None.
    """

    folder: Path
    fault: Callable[[str, int], str | None] = lambda path, number: None
    redirect: Callable[[str], str | None] = lambda path: None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of each."""
    bytes_sent: int = 0
    """Of bodies."""
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end, so that no stalled answer outlives the server."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, name: str) -> list[tuple[str, str | None]]:
        return [request for request in self.requests if request[0].endswith(name)]


@contextlib.contextmanager
def serving(folder: Path, context: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """A server of `folder` on a free port of 127.0.0.1; over https with a `context`."""
    state = FaultyServer(folder)
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    state.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    state: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms behind its head

    def do_GET(self) -> None:
        state, requested = self.state, self.headers.get("Range")
        with state.lock:
            state.requests.append((self.path, requested))
            number = len(state.requests)
        target = state.redirect(self.path)
        if target is not None:
            self._head(302, 0, Location=target)
            return
        path = state.folder / self.path.lstrip("/")
        fault = state.fault(self.path, number)
        if fault == "404" or not path.is_file():
            self._head(404, 0)
            return
        self._answer(path.read_bytes(), requested, fault)

    def _answer(self, whole: bytes, requested: str | None, fault: str | None) -> None:
        status, body, more = 200, whole, {}
        if requested and fault != "ignore Range":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", requested).groups()
            start, end = int(first), int(last or len(whole) - 1)
            status, body = 206, whole[start : end + 1]
            shift = fault == "other range"
            more = {"Content-Range": f"bytes {start + shift}-{end + shift}/{len(whole)}"}
        if fault == "escape":
            self.send_response_only(500, "secret\x1b[31m\x07")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault in ("500", "403"):
            self._head(int(fault), 0)
        elif fault == "stall":
            self.state.released.wait(60)
        elif fault == "hang up":
            self.close_connection = True
        elif fault in ("stall half-way", "truncate", "trickle"):
            self._head(status, len(body), **more)
            self._send(body[: len(body) // 2])
            if fault == "stall half-way":
                self.state.released.wait(60)
            for byte in body[len(body) // 2 :] if fault == "trickle" else b"":
                self._send(bytes([byte]))
                time.sleep(0.05)
            self.close_connection = True
        elif fault == "no length":
            self._head(status, None, **more)
            self._send(body)
            self.close_connection = True
        elif fault == "gzip":
            self._head(status, len(body), **more, **{"Content-Encoding": "gzip"})
            self._send(body)
        else:
            body = body[:-1] + bytes([body[-1] ^ 1]) if fault == "wrong bytes" else body
            self._head(status, len(body), **more)
            self._send(body)

    def _head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
            self.wfile.flush()
            with self.state.lock:
                self.state.bytes_sent += len(body)

    def log_message(self, *arguments: object) -> None:
        pass
