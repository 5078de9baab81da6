"""POST to a URL that a user chose: only to allowed targets, without redirects, and for a bounded time.

The connection pool of httpcore gets a network backend of our own: it resolves the host name once and connects to the
addresses that were checked, so DNS rebinding has no effect. TLS still verifies the certificate for the host name.
httpcore follows no redirect and reads no proxy from the environment. Only the status of the response is read.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpcore

from tpo.webhooks.addresses import AllowedTargets, is_public_text, split_url


class NotSent(Exception):
    """No response arrived. The message is an error code."""


def tls_context(authorities: Path | None) -> ssl.SSLContext:
    """Create a TLS context that trusts the system's authorities (or those of SSL_CERT_FILE) and the given ones."""
    context = ssl.create_default_context()
    if authorities is not None:
        context.load_verify_locations(authorities)
    return context


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, seconds: float, allowed: AllowedTargets, tls: ssl.SSLContext
) -> int:
    """Send a POST request and return the status of the response. Raises NotSent.

    `seconds` bounds the whole call, except that the DNS lookup can take longer.
    """
    deadline = _Deadline(seconds)
    try:
        target = split_url(url)
        address = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        # One connection for one request: a kept one would skip the checks of the next delivery.
        with (
            httpcore.ConnectionPool(ssl_context=tls, network_backend=CheckedBackend(allowed, deadline)) as pool,
            pool.stream(
                "POST", address, headers=[("host", target.authority), *headers.items()], content=body
            ) as response,
        ):
            return response.status
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, ValueError) as error:
        if isinstance(error, httpcore.TimeoutException) or deadline.is_over:
            raise NotSent("timeout") from error
        raise NotSent("connection_failed") from error


class CheckedBackend(httpcore.NetworkBackend):
    """A network backend that connects only to allowed targets, and whose connections end at a deadline."""

    def __init__(self, allowed: AllowedTargets, deadline: "_Deadline") -> None:
        self._allowed = allowed
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of a host that accepts the connection.

        Raises NotSent if the port or one of the addresses is not allowed.
        """
        last_error: Exception = httpcore.ConnectError("the host has no address")
        for address in self._resolve(host, port):
            remaining = self._deadline.remaining(httpcore.ConnectTimeout)
            try:
                stream = self._backend.connect_tcp(address, port, remaining, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last_error = error
            else:
                return _BoundedStream(stream, self._deadline)
        raise last_error

    def _resolve(self, host: str, port: int) -> list[str]:
        """Return all addresses of a host, in the resolver's order."""
        if self._allowed.ports is not None and port not in self._allowed.ports:
            raise NotSent("port_not_allowed")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise NotSent("name_not_resolved") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._allowed.private and not all(map(is_public_text, addresses)):
            raise NotSent("private_address")
        return addresses


class _Deadline:
    """The end of a call, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def remaining(self, error: type[httpcore.TimeoutException]) -> float:
        """Return the seconds that are left. Raises `error` if none are."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise error
        return seconds


class _BoundedStream(httpcore.NetworkStream):
    """A stream whose operations take no longer than the deadline allows.

    A timeout for each read would not do: a receiver that sends a byte now and then would hold the connection open.
    """

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read up to a number of bytes."""
        with _tls_failures():
            return self._stream.read(max_bytes, self._deadline.remaining(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all bytes."""
        self._stream.write(buffer, self._deadline.remaining(httpcore.WriteTimeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Start TLS on this connection. Raises NotSent if the handshake fails, as with a wrong certificate."""
        with _tls_failures():
            remaining = self._deadline.remaining(httpcore.ConnectTimeout)
            return _BoundedStream(self._stream.start_tls(ssl_context, server_hostname, remaining), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Return information about the connection, such as `ssl_object`."""
        return self._stream.get_extra_info(info)


@contextlib.contextmanager
def _tls_failures() -> Iterator[None]:
    """Raise NotSent for errors of TLS. The pool of httpcore removes the cause of an error that passes through it."""
    try:
        yield
    except httpcore.NetworkError as error:
        if isinstance(error.__cause__, ssl.SSLError):
            raise NotSent("tls_failed") from error
        raise
