"""A server with a worker and the official client of it, for all tests of a module."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import openai
import pytest

from testing.ports import free_port
from testing.processes import Process, System, running_system
from testing.waiting import HANG_SECONDS
from tests.support.api_client import KEY
from tests.support.databases import DATABASES, migrated_database


class Server(NamedTuple):
    """Running API of a system, and its URL."""

    system: System
    api: Process
    url: str

    def client(self, key: str = KEY) -> openai.OpenAI:
        """Return the official client with this server's URL and key. It does not retry, so that errors are seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANG_SECONDS)


@contextlib.contextmanager
def serving(system: System, **settings: object) -> Iterator[Server]:
    """Start an API on a system and yield it."""
    port = free_port()
    api = system.start("-m", "api", port=port, api_key=KEY, lease_seconds=30, **settings)
    api.wait_for("Listening on")
    yield Server(system, api, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module", params=DATABASES)
def shared_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """System on SQLite and on PostgreSQL, for all tests of a module."""
    folder: Path = tmp_path_factory.mktemp("system")
    with migrated_database(request.param, request, folder) as url, running_system(url, folder) as system:
        yield system


@pytest.fixture(scope="module")
def server(shared_system: System) -> Iterator[Server]:
    """Start an API and a worker that completes a job within some tenths of a second."""
    shared_system.worker(scripted_latency=0.02, concurrency=8)
    with serving(shared_system, wait_seconds=30) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """Client of that server."""
    with server.client() as client:
        yield client


@pytest.fixture
def idle(sqlite_system: System) -> Iterator[Server]:
    """Start an API without a worker: its jobs stay queued until a test changes that."""
    with serving(sqlite_system, wait_seconds=1) as server:
        yield server


@pytest.fixture
def idle_client(idle: Server) -> Iterator[openai.OpenAI]:
    """Client of the API without a worker."""
    with idle.client() as client:
        yield client
