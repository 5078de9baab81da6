"""POST to a URL that a user chose: only to public addresses, without redirects, and for a bounded time.

The host name is resolved once, and the connection goes to the addresses that were checked: DNS rebinding has no effect.
No proxy is used, and only the status of the response is read.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from tpo.webhooks.addresses import is_public


class NotSent(Exception):
    """No response arrived. The message is an error code."""


def tls_context(authorities: Path | None) -> ssl.SSLContext:
    """Create a TLS context that trusts the system's authorities (or those of SSL_CERT_FILE) and the given ones."""
    context = ssl.create_default_context()
    if authorities is not None:
        context.load_verify_locations(authorities)
    return context


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, seconds: float, allow_private: bool, tls: ssl.SSLContext
) -> int:
    """Send a POST request and return the status of the response. Raises NotSent.

    `seconds` bounds the whole call, except that the DNS lookup can take longer. `allow_private` permits addresses that
    are not public.
    """
    end = time.monotonic() + seconds
    parts = urlsplit(url)
    try:
        addresses = _resolve(parts, allow_private=allow_private)
        connection = _Connection(parts, addresses, end, tls)
        with contextlib.closing(connection):
            connection.connect()
            with connection.bounded():
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("POST", target, body, dict(headers))
                return connection.getresponse().status
    except ssl.SSLError as error:
        raise NotSent("tls_failed" if time.monotonic() < end else "timeout") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotSent("timeout" if time.monotonic() >= end else "connection_failed") from error


def _resolve(parts: SplitResult, *, allow_private: bool) -> list[str]:
    """Return all addresses of a host, in the resolver's order. Raises NotSent if one of them is not public."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotSent("name_not_resolved") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(ipaddress.ip_address(a.partition("%")[0])) for a in addresses):
        raise NotSent("private_address")
    return addresses


class _Connection(http.client.HTTPConnection):
    """A connection to one of the given addresses, without another DNS lookup."""

    def __init__(self, parts: SplitResult, addresses: list[str], end: float, tls: ssl.SSLContext) -> None:
        self._tls = tls if parts.scheme == "https" else None
        super().__init__(parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._addresses = addresses
        self._end = end
        self.default_port = 443 if self._tls else 80  # the Host header contains any other port

    def connect(self) -> None:
        """Connect to the first address that accepts the connection."""
        last_error: OSError = OSError()
        for address in self._addresses:
            remaining = self._end - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            try:
                sock = socket.create_connection((address, self.port), remaining)
            except OSError as error:
                last_error = error
                continue
            self.sock = sock
            if self._tls:
                self.sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            return
        raise last_error

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Shut the connection down at its deadline. A receiver that sends a byte now and then would hold it open."""
        sock = self.sock

        def shut_down() -> None:
            with contextlib.suppress(OSError):
                # Not the method of a TLS socket, which would wait for a thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, self._end - time.monotonic()), shut_down)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
