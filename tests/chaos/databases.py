"""The two databases of a run, and what can happen to each."""

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
    """A database with the schema, and the process that serves it where there is one."""

    url: str

    @property
    def child(self) -> Child | None:
        """Its server."""

    @property
    def faults(self) -> tuple[str, ...]:
        """What can happen to it."""

    def hold(self) -> None:
        """Let everybody wait."""

    def let_go(self) -> None:
        """Let everybody go on."""

    def cut(self) -> None:
        """Close every connection from the server's side."""


class Sqlite:
    """A file. It hangs while another program holds its write lock."""

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

    def let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def cut(self) -> None:
        raise AssertionError("SQLite has no connections to cut")


class PostgresServer:
    """A server of its own, started directly, so that every signal reaches it."""

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
                assert time.monotonic() < end, self.child.say_last()
                time.sleep(0.1)

    def hold(self) -> None:
        self.child.signal(signal.SIGSTOP, all_of_it=True)

    def let_go(self) -> None:
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
    """A database of that kind with the schema and nothing in it."""
    # Not in another's folder: as root, the server runs as a user who may not enter that.
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
            server.let_go()
            server.child.signal(signal.SIGQUIT)
            if not server.child.wait(10):
                server.child.signal(signal.SIGKILL, all_of_it=True)
                server.child.wait(10)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
