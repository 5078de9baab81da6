"""A webhook receiver for tests: an HTTP server in a thread with configurable statuses that records requests."""

import contextlib
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from testing.waiting import HANG_SECONDS


class Received(NamedTuple):
    """A recorded request."""

    headers: dict[str, str]
    body: bytes


class Receiver:
    """State of the server.

    answers: statuses of the next responses; 200 after the last one.
    received: requests so far.
    hangs: while it is set, requests are not answered until `released` is set.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[int] = []
        self.received: list[Received] = []
        self.hangs = threading.Event()
        self.released = threading.Event()


TLS = Path(__file__).parents[1] / "data" / "tls"
AUTHORITY = TLS / "authority.pem"
"""Certificate authority of test receivers only, for hooks.example, localhost and 127.0.0.1."""


@contextlib.contextmanager
def receiving(*, tls: bool = False) -> Iterator[Receiver]:
    """Yield a running receiver, with HTTPS if `tls` is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.received.append(Received(headers, body))
            if receiver.hangs.is_set():
                receiver.released.wait(HANG_SECONDS)
                return
            self.send_response(receiver.answers.pop(0) if receiver.answers else 200)
            self.send_header("location", f"{receiver.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(TLS / "receiver.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        receiver = Receiver(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield receiver
        finally:
            receiver.released.set()
            server.shutdown()
