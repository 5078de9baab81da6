"""SQLite: how a connection is prepared, and the lock that serialises writers within a process."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DisconnectionError

from tpo.core.errors import StoreUnavailableError

BUSY_SECONDS = 15


def prepare_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # this module issues BEGIN, not the driver
    _log_ahead(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, which a file keeps. SQLite does not wait for others that switch too."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def check_same_file(connection: Any, record: Any, _proxy: Any) -> None:
    """Reconnect if the file was moved or replaced: SQLite would continue to write to a file that nobody reads."""
    file = connection.execute("PRAGMA database_list").fetchone()[2]
    seen = _identity(file)
    if record.info.setdefault("file", seen) != seen:
        raise DisconnectionError("The database's file was replaced.")


def _identity(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def begin(connection: Connection) -> None:
    # A writer takes the lock at once: a transaction that reads first and upgrades later gets "database is locked".
    if begin := connection.get_execution_options().get(BEGIN, "BEGIN IMMEDIATE"):
        connection.exec_driver_sql(begin)


BEGIN = "tpo_begin"
WRITE_LOCK = "tpo_turn"
PENDING_WRITES = "tpo_waiting"


@contextmanager
def write_lock(engine: Engine) -> Iterator[None]:
    """Serialise writers within this process; SQLite's own busy handler sleeps and polls."""
    turn: threading.Lock | None = engine.get_execution_options().get(WRITE_LOCK)
    if turn is None:
        yield
    elif not turn.acquire(timeout=BUSY_SECONDS):
        raise StoreUnavailableError()
    else:
        try:
            yield
        finally:
            turn.release()
