"""Fixtures of the integration suite: systems of a database, a broker and real processes."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from testing.processes import System, running_system
from testing.services import Valkey
from testing.waiting import HANG_SECONDS
from tests.support.api_client import api_client
from tests.support.receiver import Receiver, receiving


@pytest.fixture
def system(migrated_url: str, tmp_path: Path) -> Iterator[System]:
    """System on SQLite and on PostgreSQL, without any process."""
    with running_system(migrated_url, tmp_path) as system:
        yield system


@pytest.fixture
def sqlite_system(sqlite_template: Path, tmp_path: Path) -> Iterator[System]:
    """System on SQLite, for tests that do not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "tpo.db")
    with running_system(f"sqlite:///{tmp_path}/tpo.db", tmp_path) as system:
        yield system


@pytest.fixture
def make_client(migrated_url: str, valkey: Valkey) -> Iterator[Callable[..., TestClient]]:
    """Return a function that starts an API in this process with the given settings and returns its client."""
    with contextlib.ExitStack() as stack:
        defaults = {"database_url": migrated_url, "broker_url": valkey.url}
        yield lambda **settings: stack.enter_context(api_client(**{**defaults, **settings}))


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    """Client of an API in process with default settings, on SQLite and on PostgreSQL."""
    return make_client()


@pytest.fixture
def sqlite_client_of(sqlite_template: Path, tmp_path: Path, valkey: Valkey) -> Iterator[Callable[..., TestClient]]:
    """Return a function like `make_client`, on SQLite, for tests that do not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "tpo.db")
    with contextlib.ExitStack() as stack:
        defaults = {"database_url": f"sqlite:///{tmp_path}/tpo.db", "broker_url": valkey.url}
        yield lambda **settings: stack.enter_context(api_client(**{**defaults, **settings}))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Start a webhook receiver."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def joined_senders(request: pytest.FixtureRequest) -> Iterator[None]:
    """Join the threads of senders before the test's database is removed."""
    for name in ("store", "sqlite_client"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("whd_"):
            thread.join(HANG_SECONDS)
