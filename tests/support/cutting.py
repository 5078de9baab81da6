"""A TCP proxy in front of a real server that cuts connections, answers with errors and loses responses."""

import contextlib
import math
import socket
import threading
from collections.abc import Iterator

from testing.ports import free_port


class Cutter:
    """A proxy that forwards bytes between clients and a server, with the faults that the test configures.

    budgets: for each connection, in order, the bytes of responses that are forwarded before it is cut; None forwards
        all. Connections beyond the end of the list are not cut.
    refusals: the number of next connections that are answered with `refusal`.
    lost: the number of next requests that reach the server and whose responses are dropped.
    """

    def __init__(self, target: int | str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.budgets: list[int | None] = []
        self.refusals = 0
        self.refusal = (
            b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
        )
        self.lost = 0
        self.connections = 0
        self._frozen = 0.0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Stop forwarding on the connections that are open now, and keep them open. Later ones work."""
        self._frozen = self.connections

    def freeze_forever(self) -> None:
        """Stop forwarding on all connections, also on later ones, and keep them open: a link that is silent."""
        self._frozen = math.inf

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._forward, args=(client, self.connections), daemon=True).start()

    def _forward(self, client: socket.socket, number: int) -> None:
        with client, contextlib.suppress(OSError):
            self._relay(client, number)
            client.shutdown(socket.SHUT_RDWR)  # close() alone has no effect while a thread reads from the socket

    def _relay(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            if self.refusals:
                self.refusals -= 1
                client.recv(65536)
                client.sendall(self.refusal)
                return
            budget = self.budgets.pop(0) if self.budgets else None
            self._wait_while_frozen(number)
            with self._connect() as server:
                threading.Thread(target=self._pump, args=(client, server, number), daemon=True).start()
                if self.lost:
                    self.lost -= 1
                    server.recv(65536)  # a response: the request was processed
                    return
                while budget is None or budget > 0:
                    chunk = server.recv(65536 if budget is None else min(65536, budget))
                    if not chunk:
                        return
                    self._wait_while_frozen(number)
                    client.sendall(chunk)
                    budget = budget and budget - len(chunk)

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        return server

    def _pump(self, source: socket.socket, target: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                self._wait_while_frozen(number)
                target.sendall(chunk)

    def _wait_while_frozen(self, number: int) -> None:
        if number <= self._frozen:
            threading.Event().wait()


@contextlib.contextmanager
def cutter(target: int | str) -> Iterator[Cutter]:
    """Yield a proxy in front of the server on that port or Unix socket."""
    proxy = Cutter(target)
    try:
        yield proxy
    finally:
        proxy.close()
