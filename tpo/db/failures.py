"""Translate failures of the database's drivers into errors of this project, which quote no values."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tpo.core.errors import DatabaseRefusedError, StoreUnavailableError, causes

_CANNOT_WRITE = "The database can only be read: it is a standby, or set to be read-only."
_TOO_MANY = "The database takes no more connections: raise max_connections, or run fewer processes."
_DISK_FULL = "The disk that holds the database is full."
_REASONS: dict[int | str, str] = {
    sqlite3.SQLITE_BUSY: "Another process keeps the database's file locked.",
    sqlite3.SQLITE_CANTOPEN: "The database's file cannot be opened: is it there, and may this user write there?",
    sqlite3.SQLITE_FULL: _DISK_FULL,
    sqlite3.SQLITE_IOERR: "The disk that holds the database fails.",
    sqlite3.SQLITE_READONLY: "The database can only be read: may this user write to its file and folder?",
    "0A000": _CANNOT_WRITE,  # a standby's answer to a transaction that writes
    "25006": _CANNOT_WRITE,
    "42501": "The database's user may not do that: let it own the schema and its tables.",
    "53100": _DISK_FULL,
    "53300": _TOO_MANY,
}
"""Reasons by SQLite's code or PostgreSQL's SQLSTATE: what hinders the database now, and may pass."""
_NOT_LET_IN = {
    "too many": _TOO_MANY,
    "remaining connection slots": _TOO_MANY,
    "authentication failed": "The database refuses the user or password of TPO_DATABASE_URL.",
    "pg_hba.conf": "The database refuses this user from this machine (pg_hba.conf).",
    "does not exist": "The database's server has no such user or database as TPO_DATABASE_URL names.",
}
"""The same for refused connections: the driver gives no SQLSTATE there, and a server's text is in English."""
_DAMAGED = "The database's file is damaged, or is no SQLite database: restore it, or name another file."


@contextmanager
def translate_errors() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailableError() from error
    except DBAPIError as error:
        why = _reason(error)
        if why or isinstance(error, OperationalError) or error.connection_invalidated:
            raise StoreUnavailableError(why) from error
        if getattr(error.orig, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise DatabaseRefusedError(_DAMAGED) from error
        raise


def _reason(error: DBAPIError) -> str | None:
    """Explain in our own words why the database failed: its messages may quote texts and passwords."""
    for cause in causes(error):  # where SQLite has ended the transaction itself, the rollback fails too
        if isinstance(cause, sqlite3.Error):
            why = _REASONS.get(cause.sqlite_errorcode & 0xFF)  # the extended code has more bits
        elif hasattr(cause, "sqlstate") and cause.sqlstate is None:  # from the driver, which got no answer
            why = next((why for part, why in _NOT_LET_IN.items() if part in str(cause)), None)
        else:
            why = _REASONS.get(getattr(cause, "sqlstate", None) or "")
        if why:
            return why
    return None
