"""Each link frozen forever, without a reset: a job that is submitted then still ends."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from testing.ports import free_port
from testing.processes import System, running_system, timeless, uninterrupted, worker_pid
from testing.services import Postgres, postgres_server
from tests.support.cutting import Cutter, cutter
from tpo.db import schema

pytestmark = pytest.mark.processes


def assert_exact(system: System, job_id: str) -> None:
    system.wait_for_end(job_id)
    state = system.store.jobs.state(job_id)
    assert system.store.jobs.get(job_id).status == "completed"
    assert timeless(state) == uninterrupted(state)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Yield a migrated PostgreSQL of its own."""
    with postgres_server() as server:
        schema.upgrade(server.url)
        yield server


def link(server: Postgres) -> str:
    """Return the path of a PostgreSQL's socket."""
    return str(server.folder.parent / ".s.PGSQL.5432")


def through(proxy: Cutter) -> str:
    return f"postgresql+psycopg://postgres@127.0.0.1:{proxy.port}/postgres"


def test_worker_takes_jobs_while_its_broker_link_is_frozen(sqlite_system: System) -> None:
    system = sqlite_system
    with cutter(system.broker.port) as proxy:
        worker = system.worker(broker_url=f"redis://127.0.0.1:{proxy.port}/0", scripted_latency=0.05)
        assert_exact(system, system.submit())
        proxy.freeze_forever()
        job_ids = [system.submit(seed=seed) for seed in range(6)]
        for job_id in job_ids:
            assert_exact(system, job_id)
            assert system.store.jobs.get(job_id).attempt == 1
        assert worker.popen.poll() is None
        assert worker.stop() == 0


def test_job_is_accepted_while_the_api_broker_link_is_frozen(sqlite_system: System) -> None:
    system = sqlite_system
    port = free_port()
    with cutter(system.broker.port) as proxy:
        system.start("-m", "api", port=port, broker_url=f"redis://127.0.0.1:{proxy.port}/0").wait_for("Listening on")
        system.worker(scripted_latency=0.05)
        proxy.freeze_forever()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            response = client.post("/v1/jobs", json={"input": "hello", "parameters": {"sample_size": 2}})
        assert response.status_code == 202
        assert_exact(system, response.json()["id"])


@pytest.mark.slow
def test_job_moves_while_a_worker_database_link_is_frozen(postgres: Postgres, tmp_path: Path) -> None:
    with running_system(postgres.url, tmp_path) as system, cutter(link(postgres)) as proxy:
        system.maintenance()
        first = system.worker(database_url=through(proxy), lease_seconds=3, scripted_latency=1)
        running = system.submit()
        system.wait_for_status(running, "in_progress")
        assert worker_pid(system.store.jobs.get(running)) == first.pid
        proxy.freeze_forever()
        system.worker(scripted_latency=0.05)
        waiting = system.submit(seed=1)
        for job_id in (running, waiting):
            assert_exact(system, job_id)


@pytest.mark.slow
def test_frozen_api_database_link_is_a_503_and_jobs_end(postgres: Postgres, tmp_path: Path) -> None:
    with running_system(postgres.url, tmp_path) as system, cutter(link(postgres)) as proxy:
        port = free_port()
        system.start("-m", "api", port=port, database_url=through(proxy)).wait_for("Listening on")
        system.worker(scripted_latency=0.05)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            accepted = client.post("/v1/jobs", json={"input": "hello", "parameters": {"sample_size": 2}}).json()["id"]
            proxy.freeze_forever()
            refused = client.post("/v1/jobs", json={"input": "hello"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
            assert client.get("/readyz").json()["checks"]["database"] == "missing"
        assert_exact(system, accepted)
        assert [job.id for job in system.store.jobs.page(limit=9)] == [accepted]
