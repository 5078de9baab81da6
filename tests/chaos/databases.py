"""Databases of a run, and their faults."""

import contextlib
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psycopg

from testing.services import Postgres
from tests.chaos.children import Child
from tpo.db import schema


class Database(Protocol):
    """Database with the schema, and the process that serves it, if any."""

    url: str

    @property
    def child(self) -> Child | None:
        """Process of the server."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Kinds of faults that it supports."""

    def hold(self) -> None:
        """Block all queries or writes."""

    def resume(self) -> None:
        """Unblock them."""

    def cut(self) -> None:
        """Close every connection from the server's side."""


class Sqlite:
    """SQLite file. It hangs while another connection holds its write lock."""

    child = None
    faults = ("database: hangs",)

    def __init__(self, folder: Path) -> None:
        self._file = folder / "tpo.db"
        self.url = f"sqlite:///{self._file}"
        schema.upgrade(self.url)
        self._lock: sqlite3.Connection | None = None

    def hold(self) -> None:
        connection = sqlite3.connect(self._file, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            connection.close()
            return
        self._lock = connection

    def resume(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def cut(self) -> None:
        raise AssertionError("SQLite has no connections to cut")


class PostgresServer:
    """PostgreSQL server that is started directly, so that every signal reaches it."""

    faults = ("database: hangs", "database: killed", "database: restarted", "database: connections cut")

    def __init__(self, folder: Path, logs: Path) -> None:
        server = Postgres(folder, durable=True)
        server.start()
        self.url = server.url
        schema.upgrade(self.url)
        server.stop()
        options = ("max_wal_size=64MB", "min_wal_size=32MB", "restart_after_crash=on")
        command = [*server.command, *(word for option in options for word in ("-c", option))]
        self.child = Child("database", "database", command, server.environment, logs, server.user)
        self._admin_url = server.admin_url

    def start(self) -> None:
        self.child.start()
        end = time.monotonic() + 60
        while True:
            try:
                self._admin().close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < end, self.child.log_tail()
                time.sleep(0.1)

    def hold(self) -> None:
        self.child.signal(signal.SIGSTOP, all_of_it=True)

    def resume(self) -> None:
        self.child.signal(signal.SIGCONT, all_of_it=True)

    def cut(self) -> None:
        with contextlib.suppress(psycopg.OperationalError), contextlib.closing(self._admin()) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )

    def _admin(self) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(self._admin_url, autocommit=True, connect_timeout=2)


@contextlib.contextmanager
def database(kind: str, logs: Path) -> Iterator[Database]:
    """Yield an empty database of this kind, with the schema."""
    # Not in a folder of the run: as root, the server runs as a user who may not enter that.
    folder = Path(tempfile.mkdtemp(prefix="tpo-chaos-"))
    try:
        if kind == "sqlite":
            yield Sqlite(folder)
            return
        server = PostgresServer(folder, logs)
        server.start()
        try:
            yield server
        finally:
            server.resume()
            server.child.signal(signal.SIGQUIT)
            if not server.child.wait(10):
                server.child.signal(signal.SIGKILL, all_of_it=True)
                server.child.wait(10)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
