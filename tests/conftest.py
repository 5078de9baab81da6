"""Fixtures and options shared by every suite. Tests start the servers that they need, so none is skipped."""

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Engine, make_url

from testing import forking
from testing.services import Valkey, new_database, pgbouncer_server, postgres_server, valkey_server
from tests.support import durations, isolation, progress, rerun, selection, statements
from tests.support.databases import DATABASES, migrated_database
from tpo.db import connect, schema
from tpo.store import Store

# A background run inherits an ignored SIGINT and would pass it on to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time that an example takes depends on the machine.
hypothesis.settings.register_profile("tests", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("tests")


IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugins in tests/support."""
    for plugin in (durations, progress, rerun, selection):
        plugin.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the run from this machine and register the plugins that the options ask for.

    Plugins that report or rerun are registered only in the process that controls the run.
    """
    isolation.refuse_foreign_connections()
    statements.share_compiled_statements()
    forking.enable()
    config.pluginmanager.register(selection.Selection(only_fast=config.option.fast, long=config.option.long))
    if IS_XDIST_WORKER:
        return  # an xdist worker inherits the environment of the controlling process
    config.add_cleanup(partial(isolation.leave_home, isolation.enter_own_home()))
    if config.option.rerun_failed:
        config.pluginmanager.register(rerun.RerunFailed())
    if config.option.show_progress:
        config.pluginmanager.register(progress.Progress(config, durations.Durations.load()))
    if config.option.store_durations:
        config.pluginmanager.register(durations.StoreDurations())


def pytest_xdist_auto_num_workers() -> int:
    """Run two tests for each core: about half of the time, a test waits for a process that it has started."""
    return 2 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a parallel run, start with the long tests, so that none of them delays the end of the run."""
    if IS_XDIST_WORKER:
        durations.Durations.load().order(items)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder, and fail it if it connects to a server that no test started."""
    monkeypatch.chdir(tmp_path)
    yield
    found = list(isolation.foreign_connections)
    isolation.foreign_connections.clear()
    assert not found, f"connections to servers that no test started: {found}"


@pytest.fixture(scope="session")
def postgres_admin_url() -> Iterator[str]:
    """Yield the administrator's URL of one PostgreSQL server for the whole run."""
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            server = stack.enter_context(postgres_server())
        yield server.admin_url


@pytest.fixture(scope="session")
def pgbouncer_folder(postgres_admin_url: str) -> Iterator[str]:
    """Yield the folder of a PgBouncer's socket, in transaction mode, before the PostgreSQL of the run."""
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            folder = stack.enter_context(pgbouncer_server(postgres_admin_url, ignore_options=True))
        yield folder


@pytest.fixture(scope="session")
def _session_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            server = stack.enter_context(valkey_server(tmp_path_factory.mktemp("valkey")))
        yield server


@pytest.fixture(scope="module")
def valkey(_session_valkey: Valkey) -> Valkey:
    """Return the broker shared by the whole run, empty at the start of each module. No test may stop it."""
    _session_valkey.command("FLUSHALL")
    return _session_valkey


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an empty database of each kind, without the schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tpo.db"
        return
    with new_database(request.getfixturevalue("postgres_admin_url")) as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite file built by the migrations. Tests work on copies of it."""
    file = tmp_path_factory.mktemp("template") / "tpo.db"
    schema.upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgres_template(postgres_admin_url: str) -> Iterator[str]:
    """Yield the name of a PostgreSQL database built by the migrations. Tests work on copies of it."""
    with new_database(postgres_admin_url) as url:
        schema.upgrade(url)
        name = make_url(url).database
        assert name
        yield name


@pytest.fixture(params=DATABASES)
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a database of each kind with the schema and no rows."""
    with migrated_database(request.param, request, tmp_path) as url:
        yield url


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    """Yield an engine on a database of each kind with the schema and no rows."""
    engine = connect(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """Return a store on an empty database of each kind."""
    return Store(engine)
