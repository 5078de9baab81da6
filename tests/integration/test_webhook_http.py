"""The HTTP of webhooks: which connections are made for a URL, with which names, and for how long."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testing.ports import free_port
from tests.support.receiver import AUTHORITY, Receiver, receiving
from tpo.webhooks.addresses import AllowedTargets
from tpo.webhooks.http import NotSent, post, tls_context

ANYWHERE = AllowedTargets(private=True)


def send(url: str, *, seconds: float = 60.0, allowed: AllowedTargets = ANYWHERE, tls: Any = None) -> int:
    """Post an empty object."""
    return post(url, b"{}", {"content-type": "application/json"}, seconds=seconds, allowed=allowed, tls=tls or TLS)


TLS = tls_context(AUTHORITY)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make a host name resolve to given addresses, and return the list of all names that are looked up."""
    real = socket.getaddrinfo
    lookups: list[str] = []

    def set_addresses(name: str, *addresses: str) -> list[str]:
        def resolve(host: Any, port: Any, *words: Any, **more: Any) -> Any:
            if host != name:
                return real(host, port, *words, **more)  # a literal address
            lookups.append(host)
            return [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, port))
                for address in addresses
            ]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return lookups

    return set_addresses


@contextlib.contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Yield the port of a server that handles each connection with a function in a thread."""

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_name_is_resolved_once_and_further_addresses_are_tried(
    receiver: Receiver, resolve: Callable[..., list[str]]
) -> None:
    port = receiver.url.rpartition(":")[2]
    lookups = resolve("hooks.example", "127.0.0.2", "::1", "127.0.0.1")
    assert send(f"http://hooks.example:{port}/in") == 200
    assert lookups == ["hooks.example"]
    assert receiver.received[0].headers["host"] == f"hooks.example:{port}"


@pytest.mark.parametrize("private", ["127.0.0.1", "::ffff:127.0.0.1", "fe80::1%lo", "192.0.0.192", "64:ff9b::7f00:1"])
@pytest.mark.parametrize("first", [True, False])
def test_one_private_address_prevents_every_connection(
    receiver: Receiver, resolve: Callable[..., list[str]], private: str, first: bool
) -> None:
    port = receiver.url.rpartition(":")[2]
    resolve("hooks.example", *((private, "1.1.1.1") if first else ("1.1.1.1", private)))
    with pytest.raises(NotSent, match="private_address"):
        send(f"http://hooks.example:{port}/", allowed=AllowedTargets())
    assert receiver.received == []


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:7f00:1]", "localhost"])
def test_private_host_is_not_called_in_any_spelling(receiver: Receiver, host: str) -> None:
    port = receiver.url.rpartition(":")[2]
    with pytest.raises(NotSent, match="private_address"):
        send(f"http://{host}:{port}/", allowed=AllowedTargets())
    assert receiver.received == []


def test_port_is_checked_before_the_name_is_resolved(receiver: Receiver, resolve: Callable[..., list[str]]) -> None:
    port = receiver.url.rpartition(":")[2]
    lookups = resolve("hooks.example", "127.0.0.1")
    with pytest.raises(NotSent, match="port_not_allowed"):
        send(f"http://hooks.example:{port}/", allowed=AllowedTargets(private=True, ports=frozenset({80})))
    assert (lookups, receiver.received) == ([], [])


def test_tls_verifies_the_name_and_not_the_address(resolve: Callable[..., list[str]]) -> None:
    with receiving(tls=True) as receiver:
        port = receiver.url.rpartition(":")[2]
        resolve("hooks.example", "127.0.0.1")
        assert send(f"https://hooks.example:{port}/") == 200
        with pytest.raises(NotSent, match="tls_failed"):  # an unknown authority
            send(f"https://hooks.example:{port}/", tls=tls_context(None))
        resolve("other.example", "127.0.0.1")
        with pytest.raises(NotSent, match="tls_failed"):
            send(f"https://other.example:{port}/")
        assert len(receiver.received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_returned_and_not_followed(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    assert send(receiver.url) == status
    assert len(receiver.received) == 1


def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert send(receiver.url) == 200


def test_path_and_query_are_sent_unchanged() -> None:
    received: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        received.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with raw_server(serve) as port:
        assert send(f"http://127.0.0.1:{port}/a;b=c/%2e%2e/d?x=1&y=%20;z") == 204
    assert received[0].startswith(b"POST /a;b=c/%2e%2e/d?x=1&y=%20;z HTTP/1.1\r\n")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nx-"])
def test_slow_receiver_is_cut_off_at_the_deadline(sent: bytes) -> None:
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(sent)
        connection.settimeout(0.01)
        while True:  # until the client has closed the connection
            try:
                if not connection.recv(1):
                    break
            except TimeoutError:
                pass
            except OSError:
                break
            if sent:
                connection.sendall(b"a")
        ended.set()

    with raw_server(serve) as port:
        with pytest.raises(NotSent, match="timeout"):
            send(f"http://127.0.0.1:{port}/", seconds=0.2)
        if not sent:
            assert ended.wait(60)


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 999999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\n: \r\n\r\n"]
)
def test_server_of_another_protocol_is_a_failed_connection(answer: bytes) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with raw_server(serve) as port, pytest.raises(NotSent, match="connection_failed"):
        send(f"http://127.0.0.1:{port}/")


def test_unreachable_host_has_an_error_code(resolve: Callable[..., list[str]]) -> None:
    resolve("hooks.example", "127.0.0.1", "127.0.0.2")
    with pytest.raises(NotSent, match="connection_failed"):
        send(f"http://hooks.example:{free_port()}/")
    with pytest.raises(NotSent, match="name_not_resolved"):
        send("http://hooks.invalid/")
