"""Stalled processes end by themselves, and a hanging database blocks callers only for a limited time."""

from pathlib import Path

import httpx
import pytest

from testing.ports import free_port
from testing.processes import System, running_system, timeless, uninterrupted
from testing.services import postgres_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.cutting import cutter
from tpo.broker import MAINTENANCE_QUEUE, JobNotifier
from tpo.core.errors import StoreUnavailableError
from tpo.db import connect, schema
from tpo.store import Store

pytestmark = pytest.mark.processes


def assert_exact(system: System, job_id: str) -> None:
    state = system.store.jobs.state(job_id)
    assert system.store.jobs.get(job_id).status == "completed"
    assert timeless(state) == uninterrupted(state)


def test_stalled_consumer_ends_its_process(sqlite_system: System) -> None:
    system = sqlite_system
    system.maintenance()  # notifies again: the first message is lost in the connection
    with cutter(system.broker.port) as proxy:
        worker = system.worker(broker_url=f"redis://127.0.0.1:{proxy.port}/0", renotify_seconds=0.5)
        system.wait_for_end(system.submit())
        # Like a reset that the client does not notice: its connection is open, but receives nothing any more.
        proxy.freeze()
        job_id = system.submit(seed=1)
        assert worker.popen.wait(timeout=HANG_SECONDS) == 1
        assert "the consumer takes none" in worker.output
        # It waits, or the worker took it from the database before it ended.
        assert system.store.jobs.get(job_id).status in ("queued", "completed")
        assert system.store.workers.live(60) == []
    system.worker()
    system.notify_job(job_id)
    system.wait_for_end(job_id)
    assert_exact(system, job_id)


def test_stalled_consumer_releases_its_jobs(sqlite_system: System) -> None:
    system = sqlite_system
    system.maintenance()
    with cutter(system.broker.port) as proxy:
        worker = system.worker(
            broker_url=f"redis://127.0.0.1:{proxy.port}/0", renotify_seconds=0.5, scripted_latency=1, slots=2
        )
        running = system.submit()
        system.wait_for_status(running, "in_progress")
        proxy.freeze()
        system.submit(seed=1)
        assert worker.popen.wait(timeout=HANG_SECONDS) == 1
    job = system.store.jobs.get(running)
    assert (job.status, job.lease_owner) in (("queued", None), ("completed", None))


def test_stalled_maintenance_worker_ends_too(sqlite_system: System) -> None:
    system = sqlite_system
    with cutter(system.broker.port) as proxy:
        maintenance = system.maintenance(broker_url=f"redis://127.0.0.1:{proxy.port}/0")
        proxy.freeze()
        notifier = JobNotifier(system.broker.url)
        for number in range(2):  # the first message is lost in the connection
            notifier.notify_batch(f"batch_{number}")
        notifier.close()
        assert maintenance.popen.wait(timeout=HANG_SECONDS) == 1
        assert "the consumer takes none" in maintenance.output
    assert system.broker.command("LLEN", MAINTENANCE_QUEUE) > 0


def test_busy_or_idle_worker_is_not_considered_stalled(sqlite_system: System) -> None:
    system = sqlite_system
    worker = system.worker(renotify_seconds=0.2, concurrency=1, scripted_latency=0.5)
    running = system.submit()
    system.wait_for_status(running, "in_progress")
    waiting = system.submit(seed=1)
    system.wait_for_end(running)
    system.wait_for_end(waiting)
    assert worker.stop() == 0
    assert "the consumer takes none" not in worker.output


def test_worker_with_a_stuck_model_ends(sqlite_system: System) -> None:
    system = sqlite_system
    system.maintenance()
    worker = system.start("-m", "tests.support.hanging_worker", "stuck", lease_seconds=10)
    worker.wait_for("is ready")
    job_id = system.submit()
    system.wait_for_status(job_id, "in_progress")
    assert worker.popen.wait(timeout=HANG_SECONDS) == 1
    assert "a model is stuck" in worker.output
    assert system.store.workers.live(60) == []
    system.worker()
    job = system.wait_for_end(job_id)
    assert_exact(system, job_id)
    assert job.attempt == 2  # it counts as an attempt, as a crash does


@pytest.mark.slow
def test_hanging_database_is_a_503_and_jobs_continue(tmp_path: Path) -> None:
    with postgres_server() as server:
        schema.upgrade(server.url)
        with running_system(server.url, tmp_path) as system:
            port = free_port()
            system.start("-m", "api", port=port).wait_for("Listening on")
            system.maintenance()
            worker = system.worker(scripted_latency=1)
            job_id = system.submit()
            eventually(system.calls, why="a model call should start")
            # The guarantee is a 503 within half a minute. A busy machine may take twice as long.
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                assert client.get(f"/v1/jobs/{job_id}").status_code == 200
                with server.suspended():
                    response = client.get(f"/v1/jobs/{job_id}")  # answered while the database still hangs
                    worker.wait_for("leases cannot be renewed")
                assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
                assert client.get(f"/v1/jobs/{job_id}").status_code == 200
            system.wait_for_end(job_id)
            assert_exact(system, job_id)


@pytest.mark.slow
def test_query_on_a_hanging_server_times_out() -> None:
    with postgres_server() as server:
        schema.upgrade(server.url)
        engine = connect(server.url)
        store = Store(engine)
        store.ping()
        with server.suspended(), pytest.raises(StoreUnavailableError):
            store.ping()
        store.ping()
        engine.dispose()
