"""Connections to PostgreSQL, with limits on the duration of statements, and checked before each use.

This is a separate module because its driver is slow to import, which users of SQLite should not pay for.
"""

import select
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy.exc import InvalidatePoolError

from tpo.core.errors import DatabaseRefusedError

_RESPONSE_SECONDS = 12.0
"""A PostgreSQL that has not answered by then hangs; otherwise its statement_timeout would have ended the statement."""

CONNECTION: dict[str, Any] = {
    # With these, a lost host is an error within seconds; by default it blocks for hours.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_LIMITS = (
    "-c statement_timeout=10000 -c lock_timeout=8000"
    # A process that is suspended inside a transaction must not lock rows indefinitely.
    " -c idle_in_transaction_session_timeout=15000"
)


class _ConnectionWithTimeout(psycopg.Connection[Any]):
    """A connection that closes itself if the server is too slow. A stopped server keeps its sockets open."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for the server's answer. Raises OperationalError if there is none in time."""
        try:
            return super().wait(gen, interval, timeout or _RESPONSE_SECONDS)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:  # nobody would read its answer
                self.pgconn.finish()
            raise


def open_with_limits(dialect: Any, record: Any, args: Any, named: dict[str, Any]) -> Any:
    """Open a connection with limits, added to the server options of the URL (such as a search_path)."""
    limited = {**named, "options": f"{named.get('options', '')} {_LIMITS}".strip()}
    return open_connection(dialect, record, args, limited, _ConnectionWithTimeout)


def open_connection(
    _dialect: Any,
    _record: Any,
    args: Any,
    named: dict[str, Any],
    kind: type[psycopg.Connection[Any]] = psycopg.Connection,
) -> Any:
    """Open a connection. Raises DatabaseRefusedError if the database's encoding cannot store every text."""
    connection = kind.connect(*args, **named)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise DatabaseRefusedError(
            f"The database's encoding is {encoding}, which cannot store every text: create one with ENCODING 'UTF8'."
        )
    return connection


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if the driver does not know a connection's options."""
    try:
        psycopg.conninfo.make_conninfo(**options)
    except psycopg.Error:
        raise ValueError("unknown options") from None


def check_connected(connection: Any, _record: Any, _proxy: Any) -> None:
    """Reconnect if the server has closed the connection: an idle one has data to read only then."""
    # This costs no round trip, unlike SQLAlchemy's pre-ping.
    arrived = select.poll()
    arrived.register(connection.fileno(), select.POLLIN)
    if arrived.poll(0):
        raise InvalidatePoolError("The server has closed the connection.")
