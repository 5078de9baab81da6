"""One POST to an address that a user named: never to a private one, never further than it, and for a bounded time.

The name is resolved once; what was looked at is what is connected to, so that a name that changes in between gains
nothing. No redirect is followed, no proxy asked, and of the answer the status alone is read.
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
    """No answer came. Its message is a code."""


def trusted(authorities: Path | None) -> ssl.SSLContext:
    """Whose certificates are believed: the system's authorities (or those of SSL_CERT_FILE), and these beside them."""
    context = ssl.create_default_context()
    if authorities is not None:
        context.load_verify_locations(authorities)
    return context


def post(
    url: str, body: bytes, headers: Mapping[str, str], *, seconds: float, allow_private: bool, tls: ssl.SSLContext
) -> int:
    """The status of the answer. Raises NotSent."""
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
    """All addresses of a host, in the resolver's order; one that is not public refuses them all."""
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
    """A connection to one of these addresses, whatever the name means by now."""

    def __init__(self, parts: SplitResult, addresses: list[str], end: float, tls: ssl.SSLContext) -> None:
        self._tls = tls if parts.scheme == "https" else None
        super().__init__(parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._addresses = addresses
        self._end = end
        self.default_port = 443 if self._tls else 80  # the Host header names any other

    def connect(self) -> None:
        """Connect to the first address that answers."""
        failed: OSError = OSError()
        for address in self._addresses:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                sock = socket.create_connection((address, self.port), left)
            except OSError as error:
                failed = error
                continue
            self.sock = sock
            if self._tls:
                self.sock = self._tls.wrap_socket(sock, server_hostname=self.host)
            return
        raise failed

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Cut the connection at its end: a receiver that sends a byte now and then would hold it for ever."""
        sock = self.sock

        def cut() -> None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of a TLS socket too, whose own waits for its reader

        timer = threading.Timer(max(0.0, self._end - time.monotonic()), cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
