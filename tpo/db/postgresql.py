"""Connections to PostgreSQL: with limits on how long a statement may take, and checked before each use.

A module of its own because its driver takes a third of a second to import, which SQLite users should not pay for.
"""

import select
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy.exc import InvalidatePoolError

from tpo.core.errors import DatabaseRefusedError

_ANSWER_SECONDS = 12.0
"""A PostgreSQL that has not answered by then hangs: otherwise it would have cancelled the statement itself."""

CONNECTION: dict[str, Any] = {
    # A host that is gone is an error within seconds; by default it blocks for hours.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_LIMITS = (
    "-c statement_timeout=10000 -c lock_timeout=8000"
    # A process that is stopped inside a transaction must not lock rows indefinitely.
    " -c idle_in_transaction_session_timeout=15000"
)


class _Impatient(psycopg.Connection[Any]):
    """A connection that closes itself if the server is too slow. A stopped server keeps its sockets open."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for the server's answer. Raises OperationalError if there is none in time."""
        try:
            return super().wait(gen, interval, timeout or _ANSWER_SECONDS)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:  # the answer may still come, to nobody
                self.pgconn.finish()
            raise


def open_impatiently(dialect: Any, record: Any, args: Any, named: dict[str, Any]) -> Any:
    """Open a connection with limits, in addition to the server options of the URL (a search_path, say)."""
    limited = {**named, "options": f"{named.get('options', '')} {_LIMITS}".strip()}
    return open_connection(dialect, record, args, limited, _Impatient)


def open_connection(
    _dialect: Any,
    _record: Any,
    args: Any,
    named: dict[str, Any],
    kind: type[psycopg.Connection[Any]] = psycopg.Connection,
) -> Any:
    """Open a connection to a database that can hold every text. Raises DatabaseRefusedError."""
    connection = kind.connect(*args, **named)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise DatabaseRefusedError(
            f"The database's encoding is {encoding}, which cannot hold every text: make one with ENCODING 'UTF8'."
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
    # This costs microseconds; SQLAlchemy's pre-ping costs a round trip for each query.
    arrived = select.poll()
    arrived.register(connection.fileno(), select.POLLIN)
    if arrived.poll(0):
        raise InvalidatePoolError("The server has closed the connection.")
