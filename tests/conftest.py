"""Fixtures that every suite shares. Nothing is skipped for want of a server: tests start their own."""

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
from testing.services import Valkey, new_database, postgres_server, valkey_server
from tests.support import durations, isolation, progress, rerun, selection, statements
from tests.support.databases import DATABASES, migrated_database
from tpo.db import connect, schema
from tpo.store import Store

# A run in the background inherits that Ctrl-C is ignored, and would hand it on to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's doing.
hypothesis.settings.register_profile("tests", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("tests")


IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of our own plugins."""
    for plugin in (durations, progress, rerun, selection):
        plugin.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the run from this machine; where this process controls it, report and rerun as the options say."""
    isolation.refuse_foreign_connections()
    statements.share_compiled_statements()
    forking.enable()
    config.pluginmanager.register(selection.Selection(only_fast=config.option.fast, long=config.option.long))
    if IS_XDIST_WORKER:
        return  # it has inherited the environment of the process that controls the run
    config.add_cleanup(partial(isolation.leave_home, isolation.enter_own_home()))
    if config.option.rerun_failed:
        config.pluginmanager.register(rerun.RerunFailed())
    if config.option.show_progress:
        config.pluginmanager.register(progress.Progress(config, durations.Durations.load()))
    if config.option.store_durations:
        config.pluginmanager.register(durations.StoreDurations())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a parallel run, begin with the long tests, so that no process is left with one at the end."""
    if IS_XDIST_WORKER:
        durations.Durations.load().order(items)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in an empty folder and connects only to servers that tests have started."""
    monkeypatch.chdir(tmp_path)
    yield
    found = list(isolation.foreign_connections)
    isolation.foreign_connections.clear()
    assert not found, f"connections to servers that no test has started: {found}"


@pytest.fixture(scope="session")
def postgres_admin_url() -> Iterator[str]:
    """One PostgreSQL for the whole run."""
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            server = stack.enter_context(postgres_server())
        yield server.admin_url


@pytest.fixture(scope="session")
def _session_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            server = stack.enter_context(valkey_server(tmp_path_factory.mktemp("valkey")))
        yield server


@pytest.fixture(scope="module")
def valkey(_session_valkey: Valkey) -> Valkey:
    """One broker for the whole run, empty at the start of each module. No test stops it."""
    _session_valkey.command("FLUSHALL")
    return _session_valkey


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of either kind, without the schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tpo.db"
        return
    with new_database(request.getfixturevalue("postgres_admin_url")) as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the migrations have built; each test has a copy."""
    file = tmp_path_factory.mktemp("template") / "tpo.db"
    schema.upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgres_template(postgres_admin_url: str) -> Iterator[str]:
    """The name of a database that the migrations have built; each test has a copy."""
    with new_database(postgres_admin_url) as url:
        schema.upgrade(url)
        name = make_url(url).database
        assert name
        yield name


@pytest.fixture(params=DATABASES)
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of either kind with the schema and nothing in it."""
    with migrated_database(request.param, request, tmp_path) as url:
        yield url


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    """An engine on a database with the schema."""
    engine = connect(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """An empty store."""
    return Store(engine)
