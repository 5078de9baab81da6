"""Connections of the server: each has a deadline, and their number is limited below the limit of open files.

A connection waits (for a request, or for the rest of one) or is served. Those that wait are closed after a time, and
the oldest of those is closed for a new one when there is no capacity left.
"""

import asyncio
import errno
import ipaddress
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from tpo.settings import Settings, is_loopback

logger = logging.getLogger("api")

HEADER_SECONDS = 10.0
"""Longest time from the start of a connection, or the end of its last request, to the last header of the next one."""

BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 10_000
"""A body has BODY_SECONDS, and a second more for each such number of bytes that have arrived."""

KEEP_ALIVE_SECONDS = 5
"""Longest pause between two requests of a connection."""

SPARE_FILES = 128
"""Open files that are left to the database, the broker, logs, and connections that are being opened or closed."""

MIN_FILES = 2 * SPARE_FILES
ACCEPT_BATCH = 16
"""Connections that are accepted at a time, before those accepted so far are counted."""

_LOG_SECONDS = 60.0


class FewFilesError(OSError):
    """The limit of open files is too low for a server."""


def raise_file_limit() -> int:
    """Raise this process's soft limit of open files to the hard one, and return it. Raises FewFilesError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            logger.warning("the limit of open files stays at %d: it cannot be raised to %d", soft, hard)
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    if soft < MIN_FILES:
        raise FewFilesError(f"The limit of open files is {soft}. Raise it to at least {MIN_FILES}: ulimit -n 1024")
    return soft


class RateLimitedLog:
    """Logs each kind of message once a minute, with the number of those left out."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def warn(self, kind: str, message: str) -> None:
        """Log a message, unless one of its kind was logged within the last minute."""
        if self._now() - self._last.get(kind, -_LOG_SECONDS) < _LOG_SECONDS:
            self._left_out[kind] += 1
            return
        self._last[kind] = self._now()
        more = self._left_out.pop(kind, 0)
        logger.warning("%s%s", message, f" ({more} times more since the last such line)" if more else "")

    def filter(self, record: logging.LogRecord) -> bool:
        """Log one of uvicorn's warnings, which clients cause, once a minute. Pass its errors."""
        if record.levelno > logging.WARNING:
            return True
        self.warn(record.msg, record.getMessage())
        return False


class Connections:
    """The open connections of one server. For its event loop only."""

    def __init__(self, settings: Settings, open_files: int, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = min(settings.max_connections, open_files - SPARE_FILES)
        self.log = RateLimitedLog(now)
        self.now = now
        self._per_address = settings.max_connections_per_address
        self._trusted = [ipaddress.ip_network(each) for each in settings.trusted_proxies or ()]
        self._open: dict[GuardedProtocol, None] = {}
        self._addresses: Counter[str] = Counter()

    @property
    def max_streams(self) -> int:
        """The maximum number of event streams. It leaves connections to other requests."""
        return self.limit - max(1, self.limit // 8)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "GuardedProtocol") -> bool:
        """Count a new connection. Returns False if there is no capacity for it."""
        address = connection.address
        if self._is_limited(address) and self._addresses[address] >= self._per_address:
            self.log.warn("address", f"{address} has {self._per_address} connections, and may have no more")
            if not self._close_oldest_waiting(address):
                return False
        if len(self._open) >= self.limit:
            self.log.warn("total", f"{self.limit} connections are open: those that wait are closed for new ones")
            if not self._close_oldest_waiting(None):
                return False
        self._open[connection] = None
        self._addresses[address] += 1
        return True

    def remove(self, connection: "GuardedProtocol") -> None:
        """Forget a connection that was closed or refused."""
        if connection in self._open:
            del self._open[connection]
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def close_expired(self) -> None:
        """Close the connections whose deadline has passed."""
        now = self.now()
        for connection in [each for each in self._open if each.deadline is not None and each.deadline <= now]:
            if connection.extends():
                continue
            self.log.warn("deadline", "connections are closed because their requests do not arrive")
            connection.close()

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error of the event loop: a connection that cannot be accepted is logged once a minute."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self.log.warn("accept", f"connections cannot be accepted: {error.strerror}")
        else:
            loop.default_exception_handler(context)

    def _close_oldest_waiting(self, address: str | None) -> bool:
        for connection in self._open:  # the oldest first
            if connection.deadline is not None and address in (None, connection.address):
                connection.close()
                return True
        return False

    def _is_limited(self, address: str) -> bool:
        if not address or is_loopback(address):
            return False
        return not any(ipaddress.ip_address(address) in network for network in self._trusted)


class GuardedProtocol(H11Protocol):
    """HTTP of one connection, with a deadline for as long as it waits for bytes."""

    deadline: float | None
    """When the connection is closed, unless bytes arrive; None while a request is served."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._counted_by = connections
        self._body_began: float | None = None
        self._body_bytes = 0
        self.address = ""
        self.deadline = connections.now() + HEADER_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or close it."""
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        super().connection_made(transport)
        if not self._counted_by.add(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._counted_by.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handle bytes, and set the deadline for the next ones."""
        was_body = self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        self._body_bytes += len(data) if was_body else 0
        self._set_deadline()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.deadline = None
        super().on_response_complete()
        self._set_deadline()

    def extends(self) -> bool:
        """Extend the deadline if the server itself is what reads no further."""
        if self.flow.read_paused:
            self.deadline = self._counted_by.now() + BODY_SECONDS
            return True
        return False

    def close(self) -> None:
        """Close the connection at once."""
        self._counted_by.remove(self)
        self.transport.abort()

    def _set_deadline(self) -> None:
        state, now = self.conn.their_state, self._counted_by.now()
        if state is not h11.SEND_BODY:
            self._body_began, self._body_bytes = None, 0
        if state is h11.IDLE:
            if self.deadline is None:
                self.deadline = now + KEEP_ALIVE_SECONDS + HEADER_SECONDS
        elif state is h11.SEND_BODY:
            self._body_began = self._body_began or now
            self.deadline = self._body_began + BODY_SECONDS + self._body_bytes / BODY_BYTES_PER_SECOND
        else:
            self.deadline = None
