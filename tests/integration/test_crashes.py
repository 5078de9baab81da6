"""Killed, paused and restarted processes and servers. Every job must end as in an undisturbed run."""

import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from testing.processes import Process, StartedCall, System, running_system, timeless, uninterrupted, worker_pid
from testing.services import postgres_server
from testing.waiting import eventually
from tpo.broker import queue_name
from tpo.db import schema
from tpo.settings import SCRIPTED

pytestmark = pytest.mark.processes

PHASES = [("sample", 0), ("score", 0), ("critique", 1), ("gradient", 1), ("update", 1), ("score", 1)]


def assert_exact(system: System, *job_ids: str) -> None:
    """Assert that the jobs completed with the rows of an uninterrupted run and with events without a gap."""
    for job_id in job_ids:
        job, state = system.store.jobs.get(job_id), system.store.jobs.state(job_id)
        assert job.status == "completed", (job.error_code, job.error_message)
        assert timeless(state) == uninterrupted(state)
        assert state.best
        assert job.output == state.best.text
        events = system.store.jobs.events(job_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert events[-1].type == "job.completed"


def repeated(calls: list[StartedCall]) -> int:
    """Count the model calls that were started again."""
    return sum(count - 1 for count in Counter(call.digest for call in calls).values())


def wait_for_call(system: System, phase: tuple[str, int]) -> StartedCall:
    """Wait for a call of this phase that was started by a worker which still runs, and return it."""

    def started() -> StartedCall | None:
        calls = [call for call in system.calls() if call.phase == phase]
        return next((call for call in calls if system.process_of(call.pid).popen.poll() is None), None)

    return eventually(started, why=f"a running worker should start a call of {phase}")


def wait_for_call_of(system: System, worker: Process) -> None:
    eventually(lambda: [c for c in system.calls() if c.pid == worker.pid], why="this worker should start a call")


def wait_for_claim(system: System, job_id: str, fence: int) -> None:
    eventually(lambda: system.store.jobs.get(job_id).fence >= fence, why="the job should be claimed again")


def claimed_again_or_ended(system: System, job_id: str, fence: int) -> bool:
    job = system.store.jobs.get(job_id)
    return job.fence > fence or job.completed_at is not None


@pytest.mark.slow
def test_worker_killed_in_each_phase_changes_nothing(system: System) -> None:
    rng = random.Random(20250112)
    system.maintenance()
    for _ in range(2):
        system.worker(lease_seconds=2, scripted_latency=1)
    job_id = system.submit(max_attempts=len(PHASES) + 2)
    for phase in PHASES:
        call = wait_for_call(system, phase)
        time.sleep(rng.uniform(0, 0.9))
        fence = system.store.jobs.get(job_id).fence
        system.process_of(call.pid).kill()
        system.start("-m", "worker", lease_seconds=2, scripted_latency=1)
        # If the test itself was stopped for seconds, the kill came too late and the job has ended.
        eventually(partial(claimed_again_or_ended, system, job_id, fence), why="the job should be claimed again")
        if system.store.jobs.get(job_id).completed_at:
            break
    system.wait_for_end(job_id)
    assert_exact(system, job_id)
    calls = system.calls()
    assert repeated(calls) <= len(PHASES)
    assert max(Counter(call.digest for call in calls).values()) <= 2
    assert len(calls) == len(system.store.jobs.state(job_id).calls) + repeated(calls)


def test_worker_that_lost_its_lease_writes_nothing(system: System) -> None:
    system.maintenance()
    first = system.worker(scripted_latency=0.5, lease_seconds=5)
    job_id = system.submit()
    wait_for_call(system, ("score", 0))
    system.pause(first)
    system.worker(scripted_latency=0.5, lease_seconds=30)
    wait_for_claim(system, job_id, 2)
    first.proceed()
    first.wait_for(f"{job_id} left: its lease is lost")
    assert system.store.jobs.get(job_id).status == "in_progress"
    assert worker_pid(system.store.jobs.get(job_id)) != first.pid
    system.wait_for_end(job_id)
    assert_exact(system, job_id)
    assert repeated(system.calls()) <= 1
    assert system.store.jobs.get(job_id).fence == 3  # the second claim ran it apart from other jobs, for one step


def test_sigterm_under_load_loses_and_repeats_no_call(system: System) -> None:
    system.maintenance(renotify_seconds=600)  # the worker itself notifies of the jobs that it releases
    workers = [system.worker(concurrency=4) for _ in range(2)]
    job_ids = [system.submit(seed=seed) for seed in range(16)]
    for worker in workers:
        wait_for_call_of(system, worker)
        successor = system.start("-m", "worker")
        assert worker.stop() == 0
        assert not [j for j in system.store.jobs.page(limit=100) if f"-{worker.pid}-" in (j.lease_owner or "")]
        successor.wait_for("is ready")
    jobs = [system.wait_for_end(job_id) for job_id in job_ids]
    assert_exact(system, *job_ids)
    assert repeated(system.calls()) == 0
    assert {job.attempt for job in jobs} == {1}
    assert sum(job.fence for job in jobs) > len(jobs)


def test_sigterm_interrupts_a_long_call(system: System) -> None:
    worker = system.worker(scripted_latency=3600, drain_seconds=0.5)
    job_id = system.submit()
    eventually(system.calls, why="a model call should start")
    assert worker.stop() == 0
    job = system.store.jobs.get(job_id)
    assert (job.status, job.attempt, job.lease_owner) == ("queued", 0, None)


def test_sigterm_ends_a_worker_with_a_hanging_thread(sqlite_system: System) -> None:
    system = sqlite_system
    worker = system.start("-m", "tests.support.hanging_worker", drain_seconds=0.5)
    worker.wait_for("is ready")
    job_id = system.submit()
    system.wait_for_status(job_id, "in_progress")
    assert worker.stop() == 0
    job = system.store.jobs.get(job_id)
    assert (job.status, job.attempt, job.lease_owner) == ("queued", 0, None)
    assert system.store.workers.live(60) == []
    system.worker()
    system.wait_for_end(job_id)
    assert_exact(system, job_id)


def test_jobs_survive_the_loss_of_all_broker_data(system: System) -> None:
    system.maintenance()
    lost = [system.submit(seed=seed) for seed in range(3)]
    system.broker.command("FLUSHALL")
    system.worker(concurrency=2, scripted_latency=0.1)
    running = [system.submit(seed=seed, max_iterations=10) for seed in range(3, 6)]
    system.wait_for_status(running[0], "in_progress")
    system.broker.command("FLUSHALL")
    system.broker.stop(kill=True)
    unnotified = [system.submit(seed=seed) for seed in range(6, 9)]
    system.broker.start()
    for job_id in lost + running + unnotified:
        system.wait_for_end(job_id)
    assert_exact(system, *lost, *running, *unnotified)
    assert repeated(system.calls()) == 0


def test_queued_wakeups_survive_a_killed_broker(sqlite_system: System) -> None:
    system = sqlite_system
    job_id = system.submit()
    assert system.broker.persisted(), "the append-only file was not written to disk"
    system.broker.stop(kill=True)
    system.broker.start()
    assert system.broker.command("LLEN", queue_name(SCRIPTED)) == 1
    system.worker()
    system.wait_for_end(job_id)


def test_job_that_kills_its_workers_fails_and_others_complete(system: System) -> None:
    system.maintenance()
    poison = system.submit("Poison.", max_attempts=2)
    for attempt in (1, 2):
        worker = system.worker(lease_seconds=4, scripted_latency=1)
        # The status would still be that of the attempt before, whose lease has not expired.
        wait_for_claim(system, poison, attempt)
        worker.kill()
    job = system.wait_for_end(poison)
    assert (job.status, job.error_code, job.attempt) == ("failed", "worker_lost", 2)
    system.worker()
    system.wait_for_end(other := system.submit())
    assert_exact(system, other)


def test_retry_delay_survives_every_process(system: System) -> None:
    worker = system.start("-m", "tests.support.unavailable_worker")
    worker.wait_for("is ready")
    job_id = system.submit(max_attempts=2)
    worker.wait_for("for another attempt (backend_unavailable)")
    worker.kill()
    system.broker.command("FLUSHALL")
    waiting = system.store.jobs.get(job_id)
    assert (waiting.status, waiting.attempt) == ("queued", 1)
    assert waiting.next_attempt_at
    system.worker()
    system.notify_job(job_id)  # too early: must be ignored
    system.maintenance()
    system.wait_for_end(job_id)
    assert_exact(system, job_id)
    first, second = (e.created_at for e in system.store.jobs.events(job_id) if e.type == "job.started")
    assert first < waiting.next_attempt_at <= second


def test_budget_holds_after_a_killed_worker(system: System) -> None:
    system.maintenance()
    worker = system.worker(lease_seconds=4)
    job_id = system.submit(max_iterations=9, max_output_tokens=250)
    wait_for_call(system, ("critique", 1))
    worker.kill()
    system.worker()
    job, state = system.wait_for_end(job_id), system.store.jobs.state(job_id)
    assert (job.status, job.incomplete_reason, job.attempt) == ("incomplete", "max_output_tokens", 2)
    assert timeless(state) == uninterrupted(state)
    assert state.best
    assert job.output == state.best.text


@pytest.mark.slow
def test_database_restart_repeats_no_call(tmp_path: Path) -> None:
    with postgres_server() as server:
        schema.upgrade(server.url)
        with running_system(server.url, tmp_path) as system:
            system.maintenance()
            system.worker(scripted_latency=1)
            job_ids = [system.submit(seed=seed) for seed in range(3)]
            wait_for_call(system, ("critique", 1))
            server.stop()
            server.start()
            for job_id in job_ids:
                system.wait_for_end(job_id)
            assert_exact(system, *job_ids)
            assert repeated(system.calls()) == 0
            assert {system.store.jobs.get(job_id).attempt for job_id in job_ids} == {1}


def test_idle_processes_survive_a_broker_restart(sqlite_system: System) -> None:
    system = sqlite_system
    processes: list[Process] = [system.worker(), system.maintenance()]
    for _ in range(2):
        system.broker.stop(kill=True)
        system.broker.start()
        job_id = system.submit(notify=False)
        system.wait_for_end(job_id)
        assert_exact(system, job_id)
    assert [process.stop() for process in processes] == [0, 0]
