"""Translate failures of the database's drivers into errors of this project, which quote no values."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    InvalidRequestError,
    OperationalError,
    ResourceClosedError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tpo.core.errors import DatabaseRefusedError, StatementFailedError, StoreUnavailableError, causes

_CANNOT_WRITE = "The database can only be read: it is a standby, or set to be read-only."
_TOO_MANY = "The database takes no more connections: raise max_connections, or run fewer processes."
DISK_FULL = "The disk that holds the database is full."
_REASONS: dict[int | str, str] = {
    sqlite3.SQLITE_BUSY: "Another process keeps the database's file locked.",
    sqlite3.SQLITE_CANTOPEN: "The database's file cannot be opened: is it there, and may this user write there?",
    sqlite3.SQLITE_FULL: DISK_FULL,
    sqlite3.SQLITE_IOERR: "The disk that holds the database fails.",
    sqlite3.SQLITE_READONLY: "The database can only be read: may this user write to its file and folder?",
    "0A000": _CANNOT_WRITE,  # a standby's answer to a transaction that writes
    "25006": _CANNOT_WRITE,
    "42501": "The database's user may not do that: let it own the schema and its tables.",
    "53100": DISK_FULL,
    "53300": _TOO_MANY,
}
"""Messages by SQLite's code or PostgreSQL's SQLSTATE, for conditions that may pass."""
_CONNECTION_REFUSED = {
    "too many": _TOO_MANY,
    "remaining connection slots": _TOO_MANY,
    "authentication failed": "The database refuses the user or password of TPO_DATABASE_URL.",
    "pg_hba.conf": "The database refuses this user from this machine (pg_hba.conf).",
    "does not exist": "The database's server has no such user or database as TPO_DATABASE_URL names.",
}
"""Messages for refused connections: the driver gives no SQLSTATE there, and the server's text is in English."""
_DAMAGED = "The database's file is damaged, or is no SQLite database: restore it, or name another file."


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate errors of the database, of its driver and of its connection pool.

    Raises StoreUnavailableError for conditions that may pass, and its subclasses DatabaseRefusedError and
    StatementFailedError for others. An IntegrityError passes: callers recognise duplicates by it.
    """
    try:
        yield
    except (PoolTimeout, DisconnectionError, ResourceClosedError) as error:
        raise StoreUnavailableError() from error
    except DBAPIError as error:
        message = _reason(error)
        if message or isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
            raise StoreUnavailableError(message) from error
        if getattr(error.orig, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise DatabaseRefusedError(_DAMAGED) from error
        if isinstance(error, IntegrityError):
            raise
        raise _statement_failed(error) from error
    except InvalidRequestError as error:  # such as PendingRollbackError, after an error that went unnoticed
        raise _statement_failed(error) from error
    except Exception as error:
        if not is_driver_error(error):
            raise
        raise StoreUnavailableError() from error


def is_driver_error(error: BaseException) -> bool:
    """Return whether a database driver raised the error itself, outside of SQLAlchemy."""
    return any(kind.__name__ == "Error" and kind.__module__ in ("sqlite3", "psycopg") for kind in type(error).__mro__)


def _statement_failed(error: Exception) -> StatementFailedError:
    return StatementFailedError(f"The database refuses a statement ({type(error).__name__}).")


def _reason(error: DBAPIError) -> str | None:
    """Return a message that explains the failure, or None. The database's own may quote texts and passwords."""
    for cause in causes(error):  # if SQLite has ended the transaction itself, the rollback fails too
        if isinstance(cause, sqlite3.Error):
            message = _REASONS.get(cause.sqlite_errorcode & 0xFF)  # the extended code has more bits
        elif hasattr(cause, "sqlstate") and cause.sqlstate is None:  # from the driver, which got no answer
            message = next((message for part, message in _CONNECTION_REFUSED.items() if part in str(cause)), None)
        else:
            message = _REASONS.get(getattr(cause, "sqlstate", None) or "")
        if message:
            return message
    return None
