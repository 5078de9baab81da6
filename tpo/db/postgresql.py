"""Connections to PostgreSQL, with limits on the duration of statements, and checked before each use.

This is a separate module because its driver is slow to import, which users of SQLite should not pay for.
"""

import select
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection
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
_LIMITS = {
    "statement_timeout": "10000",
    "lock_timeout": "8000",
    # A process that is suspended inside a transaction must not lock rows indefinitely.
    "idle_in_transaction_session_timeout": "15000",
}
_OWN_SESSION = "tpo.own_session"
"""Set when a connection is opened, and absent where a pooler gives each transaction another server connection."""
_STARTUP_OPTIONS = " ".join(f"-c {name}={value}" for name, value in {**_LIMITS, _OWN_SESSION: "yes"}.items())
_SET_LOCAL = "SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in _LIMITS.items())
_POOLED = "tpo_pooled"


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


def opener_with_limits() -> Callable[[Any, Any, Any, dict[str, Any]], Any]:
    """Return a function that opens connections with limits on the duration of statements.

    The limits are added to the server options of the URL (such as a search_path). A pooler in transaction mode, such as
    PgBouncer, refuses or ignores them; then `set_limits` sets them in each transaction, and nothing is prepared.
    """
    options_refused = False

    def open_with_limits(_dialect: Any, record: Any, args: Any, named: dict[str, Any]) -> Any:
        nonlocal options_refused
        if not options_refused:
            options = f"{named.get('options', '')} {_STARTUP_OPTIONS}".strip()
            try:
                connection = _open(args, {**named, "options": options}, _ConnectionWithTimeout)
            except psycopg.OperationalError as error:
                if "unsupported startup parameter" not in str(error):
                    raise
                options_refused = True
            else:
                record.info[_POOLED] = not _has_own_session(connection)
                return _without_prepared_statements(connection) if record.info[_POOLED] else connection
        record.info[_POOLED] = True
        return _without_prepared_statements(_open(args, named, _ConnectionWithTimeout))

    return open_with_limits


def open_without_limits(_dialect: Any, _record: Any, args: Any, named: dict[str, Any]) -> Any:
    """Open a connection for statements that may take as long as they need."""
    return _without_prepared_statements(_open(args, named, psycopg.Connection))


def set_limits(connection: Connection) -> None:
    """Set the limits for one transaction, if its connection goes through a pooler that dropped them."""
    # A single query outside of a transaction has only the client's timeout.
    if connection.info.get(_POOLED) and connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql(_SET_LOCAL)


def _has_own_session(connection: psycopg.Connection[Any]) -> bool:
    connection.autocommit = True
    row = connection.execute("SELECT current_setting(%s, true)", (_OWN_SESSION,)).fetchone()
    connection.autocommit = False
    return row is not None and row[0] == "yes"


def _without_prepared_statements(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    connection.prepare_threshold = None
    return connection


def _open(args: Any, named: dict[str, Any], kind: type[psycopg.Connection[Any]]) -> psycopg.Connection[Any]:
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
