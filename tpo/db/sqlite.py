"""SQLite: preparation of connections, and the lock that serialises writers within a process."""

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
    """Configure a new connection: explicit transactions, write-ahead logging, durable commits, foreign keys."""
    connection.isolation_level = None  # this module issues BEGIN, not the driver
    _enable_wal(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _enable_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to write-ahead logging. Retries, because SQLite does not wait for others that switch too."""
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
    """Reconnect if the file was moved or replaced; otherwise SQLite would write to a file that nobody reads."""
    file = connection.execute("PRAGMA database_list").fetchone()[2]
    identity = _identity(file)
    if record.info.setdefault("file", identity) != identity:
        raise DisconnectionError("The database's file was replaced.")


def _identity(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def begin(connection: Connection) -> None:
    """Begin a transaction by the statement in the connection's options; by default, one that writes."""
    # A writer takes the lock at once: a transaction that reads first and upgrades later gets "database is locked".
    if statement := connection.get_execution_options().get(BEGIN, "BEGIN IMMEDIATE"):
        connection.exec_driver_sql(statement)


BEGIN = "tpo_begin"
WRITE_LOCK = "tpo_write_lock"
PENDING_WRITES = "tpo_pending_writes"


@contextmanager
def write_lock(engine: Engine) -> Iterator[None]:
    """Serialise writers within this process. SQLite's own busy handler sleeps and polls."""
    lock: threading.Lock | None = engine.get_execution_options().get(WRITE_LOCK)
    if lock is None:
        yield
    elif not lock.acquire(timeout=BUSY_SECONDS):
        raise StoreUnavailableError()
    else:
        try:
            yield
        finally:
            lock.release()
