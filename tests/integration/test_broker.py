"""Order of jobs and paused queues, with real workers and a real broker, on both databases."""

import json
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from testing.jobs import create_many, execute
from testing.processes import System, timeless, uninterrupted
from testing.waiting import eventually
from tpo.broker import MAX_QUEUED_WAKEUPS, queue_name
from tpo.cli import app
from tpo.db import reading
from tpo.jobs.tables import Job
from tpo.jobs.view import JobView
from tpo.settings import SCRIPTED
from tpo.tenants.tenants import Limits

pytestmark = pytest.mark.processes

SLOTS = 4
SHORT: dict[str, Any] = {"mode": "bon", "sample_size": 1}


def claimed(system: System, *tenants: str) -> list[JobView]:
    """Return the jobs of these tenants that were ever claimed, in the order of their claims."""
    with reading(system.engine) as session:
        found = select(Job).where(Job.started_at.is_not(None), Job.tenant.in_(tenants))
        return list(session.scalars(found.order_by(Job.started_at)))


def wakeups(system: System) -> int:
    return int(system.broker.command("LLEN", queue_name(SCRIPTED)))


def test_ten_jobs_wait_at_most_twice_as_long_among_10000(system: System) -> None:
    template, small_template = (system.submit(notify=False, **SHORT) for _ in range(2))
    create_many(system.engine, template, 10_000, tenant="big")
    small = create_many(system.engine, small_template, 10, tenant="small", status="paused")
    system.notify_job(template)
    system.worker(slots=SLOTS, scripted_latency=0.05)
    eventually(lambda: len(claimed(system, "big")) >= 2 * SLOTS, why="jobs of the large tenant should run")
    execute(system.engine, "UPDATE jobs SET status = 'queued' WHERE tenant = 'small'")
    earlier = {job.id for job in claimed(system, "big")}
    eventually(lambda: len(claimed(system, "small")) == 10, why="all jobs of the small tenant should be claimed")
    order = [job for job in claimed(system, "big", "small") if job.id not in earlier]
    positions = [number for number, job in enumerate(order, 1) if job.tenant == "small"]
    assert [job.id for job in order if job.tenant == "small"] == small
    # Without the other tenant, the tenth job would be the tenth claim. Claims made while the ten arrived do not count.
    assert positions[-1] <= 2 * 10 + SLOTS, positions
    assert wakeups(system) <= MAX_QUEUED_WAKEUPS
    print("claims of the small tenant:", positions)


def test_queued_wakeups_are_bounded_and_all_jobs_run(system: System) -> None:
    job_ids = [system.submit(seed=seed, **SHORT) for seed in range(MAX_QUEUED_WAKEUPS + 8)]
    assert wakeups(system) == MAX_QUEUED_WAKEUPS
    urgent = system.submit(priority=100, **SHORT)
    assert wakeups(system) == MAX_QUEUED_WAKEUPS
    system.worker(concurrency=2, scripted_latency=0)
    for job_id in (*job_ids, urgent):
        assert system.wait_for_end(job_id).status == "completed"
    assert claimed(system, "default")[0].id == urgent
    eventually(lambda: wakeups(system) == 0, why="no wake-up should be left")


def test_limit_of_running_jobs_holds_over_workers(system: System) -> None:
    system.store.tenants.set_limits("default", Limits(running=2))
    for _ in range(2):
        system.worker(slots=SLOTS, scripted_latency=0.05)
    job_ids = [system.submit(seed=seed, **SHORT) for seed in range(12)]
    for job_id in job_ids:
        system.wait_for_end(job_id)
    jobs = claimed(system, "default")
    moments = sorted([(j.started_at or 0, 1) for j in jobs] + [(j.completed_at or 0, -1) for j in jobs])
    running = peak = 0
    for _, change in moments:
        running += change
        peak = max(peak, running)
    assert peak == 2
    assert Counter(job.status for job in jobs) == {"completed": 12}


def test_paused_queue_stops_within_one_step_and_resumes(system: System) -> None:
    system.maintenance()
    for _ in range(2):
        system.worker(concurrency=2, scripted_latency=0.3)
    job_ids = [system.submit(seed=seed) for seed in range(8)]
    for rounds in range(1, 3):
        eventually(lambda n=rounds: len(system.calls()) >= 6 * n, why="model calls should be running")  # type: ignore[misc]
        running = [j.id for j in system.store.jobs.page(limit=99, statuses=["in_progress"])]
        system.store.queues.pause(SCRIPTED)
        steps = {job_id: len(system.store.jobs.state(job_id).calls) for job_id in running}
        eventually(
            lambda: not system.store.jobs.page(limit=99, statuses=["in_progress"]), why="all jobs should be released"
        )
        for job_id, before in steps.items():
            # One step was running. If its worker checked just before the pause, it does one more.
            assert len(system.store.jobs.state(job_id).calls) - before <= 2
        calls = len(system.calls())
        system.notify_job(job_ids[0])
        system.store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60)
        eventually(lambda: wakeups(system) == 0, why="a worker should take the wake-up")
        assert len(system.calls()) == calls, "a model call ran while the queue was paused"
        for job_id in system.store.queues.resume(SCRIPTED):
            system.notify_job(job_id)
    for job_id in job_ids:
        job = system.wait_for_end(job_id)
        assert (job.status, job.attempt) == ("completed", 1)
        assert timeless(system.store.jobs.state(job_id)) == uninterrupted(system.store.jobs.state(job_id))
    calls_made = Counter(call.digest for call in system.calls())
    assert max(calls_made.values()) == 1, "a step was repeated"


def test_queues_commands_list_pause_and_resume(system: System) -> None:
    def tpo(*words: str) -> str:
        done = CliRunner().invoke(app, ["queues", *words], env=system.environment)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "no queues" in tpo("list")
    system.worker(scripted_latency=0.05)
    eventually(lambda: system.store.workers.live(10), why="the worker should be registered")
    assert "is paused" in tpo("pause", SCRIPTED)
    job_id = system.submit()
    (shown,) = json.loads(tpo("list", "--json"))
    assert (shown["model"], shown["waiting"], shown["running"], shown["workers"]) == (SCRIPTED, 1, 0, 1)
    assert shown["paused_at"] is not None
    assert SCRIPTED in tpo("list")
    assert system.store.jobs.get(job_id).fence == 0
    assert json.loads(tpo("resume", SCRIPTED, "--json")) == {"model": SCRIPTED, "state": "resumed"}
    assert system.wait_for_end(job_id).status == "completed"
    rejected = CliRunner().invoke(app, ["queues", "pause", "no such"], env=system.environment)
    assert rejected.exit_code == 2
    assert "There is no queue 'no such'" in rejected.output
