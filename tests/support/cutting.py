"""A TCP proxy that cuts connections, and one that answers errors in front of the real server."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from testing.ports import free_port


class Cutter:
    """Carries bytes between clients and a server; each connection is cut as it is told.

    `budgets`: for each connection in turn, how many bytes of answers get through; None for all, and for all that
    come later. `refusals`: so many requests are answered with `refusal` first. `lost`: so many requests reach the
    server whole, and their answers nobody.
    """

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.budgets: list[int | None] = []
        self.refusals = 0
        self.refusal = (
            b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
        )
        self.lost = 0
        self.connections = 0
        self._frozen = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Carry nothing more on the connections that are open, and leave them open; later ones are as good as new."""
        self._frozen = self.connections

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._carry, args=(client, self.connections), daemon=True).start()

    def _carry(self, client: socket.socket, number: int) -> None:
        with client, contextlib.suppress(OSError):
            self._answer(client, number)
            client.shutdown(socket.SHUT_RDWR)  # closing alone does nothing while a thread reads from it

    def _answer(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            if self.refusals:
                self.refusals -= 1
                client.recv(65536)
                client.sendall(self.refusal)
                return
            budget = self.budgets.pop(0) if self.budgets else None
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._pump, args=(client, server, number), daemon=True).start()
                if self.lost:
                    self.lost -= 1
                    server.recv(65536)  # the answer: the request was carried out
                    return
                while budget is None or budget > 0:
                    piece = server.recv(65536 if budget is None else min(65536, budget))
                    if not piece:
                        return
                    self._wait_while_frozen(number)
                    client.sendall(piece)
                    budget = budget and budget - len(piece)

    def _pump(self, source: socket.socket, target: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self._wait_while_frozen(number)
                target.sendall(piece)

    def _wait_while_frozen(self, number: int) -> None:
        if number <= self._frozen:
            threading.Event().wait()


@contextlib.contextmanager
def cutter(port: int) -> Iterator[Cutter]:
    """A proxy before the server on that port."""
    proxy = Cutter(port)
    try:
        yield proxy
    finally:
        proxy.close()
