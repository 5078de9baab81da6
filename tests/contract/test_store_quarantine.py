"""Quarantine on both databases: suspects of a crash run apart, and only a job that was alone loses an attempt."""

from dataclasses import dataclass, field

import pytest
from sqlalchemy import Engine, select

from testing.fakes import make_step
from testing.jobs import SERVES, claim, create, put
from tpo.core.state import State
from tpo.db import reading
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome
from tpo.jobs.scheduling import Rules
from tpo.jobs.tables import Job
from tpo.store import Store
from tpo.tenants.tenants import Limits


def sweep(store: Store, renotify_seconds: float = 60) -> list[str]:
    """Run one sweep and return the ids of the jobs to notify workers of."""
    wake_ups = store.maintenance.sweep(renotify_seconds=renotify_seconds, worker_retention_seconds=60)
    return [wake_up.job_id for wake_up in wake_ups]


def lose(store: Store, job_ids: list[str], worker: str = "dead") -> None:
    """Claim these jobs with one worker, and let the worker die and be noticed."""
    for job_id in job_ids:
        claim(store, job_id, worker, seconds=-1)
    sweep(store)


def claimed_id(store: Store, worker: str = "worker-1", rules: Rules | None = None) -> str | None:
    """Claim the next job for a worker and return its id."""
    claimed = store.leases.claim(worker, 30, rules=rules, **SERVES)
    return claimed.lease.job_id if claimed else None


def group_of(store: Store, job_id: str | None) -> str | None:
    """Return the quarantine group of a job; None if it is no suspect."""
    with reading(store.engine) as session:
        return session.scalars(select(Job.quarantine).where(Job.id == job_id)).one()


def groups(store: Store, job_ids: list[str]) -> list[int]:
    """Return the sizes of the quarantine groups of these jobs."""
    names = [group_of(store, job_id) for job_id in job_ids]
    assert None not in names
    return sorted(names.count(name) for name in set(names))


def test_shared_death_costs_no_attempt(store: Store) -> None:
    job_ids = [create(store, max_attempts=1) for _ in range(16)]
    lose(store, job_ids)
    jobs = [store.jobs.get(job_id) for job_id in job_ids]
    assert {(job.status, job.attempt, job.consecutive_failures) for job in jobs} == {("queued", 0, 0)}
    assert groups(store, job_ids) == [4, 4, 4, 4]
    event = store.jobs.events(job_ids[0])[-1]
    assert event.type == "job.retrying"
    assert event.data == {"delay_seconds": 0.0, "reason": "worker_lost", "suspects": 4}


def test_last_lease_to_expire_costs_no_attempt(store: Store) -> None:
    first, last = create(store, max_attempts=1), create(store, max_attempts=1)
    claim(store, last, "dead", seconds=60)
    lose(store, [first])
    assert store.jobs.get(last).status == "in_progress"
    store.leases.renew("dead", [last], -1)
    sweep(store)
    job = store.jobs.get(last)
    assert (job.status, job.attempt, job.consecutive_failures) == ("queued", 0, 0)
    assert groups(store, [first, last]) == [1, 1]


def test_job_that_was_alone_loses_its_attempts(store: Store) -> None:
    job_id, others = create(store, max_attempts=2), [create(store) for _ in range(3)]
    lose(store, [job_id])
    job = store.jobs.get(job_id)
    assert (job.status, job.attempt, job.consecutive_failures) == ("queued", 1, 1)
    assert groups(store, [job_id]) == [1], "it must not take others with it the next time"
    lose(store, [job_id])
    job = store.jobs.get(job_id)
    assert (job.status, job.error_code, group_of(store, job_id)) == ("failed", "worker_lost", None)
    assert {store.jobs.get(other).status for other in others} == {"queued"}


def test_suspects_share_no_worker_with_others(store: Store) -> None:
    suspects = [create(store) for _ in range(9)]
    lose(store, suspects)
    ordinary = [create(store) for _ in range(2)]
    first = claimed_id(store)
    group = group_of(store, first)
    members = {job_id for job_id in suspects if group_of(store, job_id) == group}
    assert {first, claimed_id(store), claimed_id(store)} == members
    assert claimed_id(store) is None, "neither another group nor a job of the queue"
    assert group_of(store, claimed_id(store, "worker-2")) not in (None, group)
    assert {store.jobs.get(job_id).status for job_id in ordinary} == {"queued"}


def test_busy_worker_claims_no_suspect(store: Store) -> None:
    running, waiting = create(store), create(store)
    claim(store, running, "worker-1")
    suspect = create(store)
    lose(store, [suspect])
    assert claimed_id(store) == waiting
    assert claimed_id(store) is None
    assert claimed_id(store, "worker-2") == suspect


def test_empty_worker_claims_what_waits_longest(store: Store, engine: Engine) -> None:
    suspect, old = create(store), create(store)
    lose(store, [suspect])
    put(engine, old, queued_at=1.0)
    assert claimed_id(store) == old
    assert claimed_id(store, "worker-2") == suspect


def test_recorded_step_clears_a_suspect(store: Store) -> None:
    suspects = [create(store), create(store)]
    lose(store, suspects)
    claimed = store.leases.claim("worker-1", 30, **SERVES)
    assert claimed
    lease = claimed.lease
    assert lease.quarantine
    store.leases.checkpoint(lease, make_step(claimed.state))
    assert group_of(store, lease.job_id) is None
    store.leases.release(lease)
    other = next(job_id for job_id in suspects if job_id != lease.job_id)
    assert claimed_id(store) == other
    assert claimed_id(store) is None
    assert claimed_id(store, "worker-2") == lease.job_id


@pytest.mark.parametrize("end", ["finish", "cancel", "deadline"])
def test_ended_job_leaves_quarantine(store: Store, engine: Engine, end: str) -> None:
    job_id = create(store)
    lose(store, [job_id])
    if end == "finish":
        store.leases.finish(claim(store, job_id)[0], Outcome("completed"))
    elif end == "cancel":
        store.jobs.cancel(job_id)
    else:
        put(engine, job_id, deadline_at=1.0)
        sweep(store)
    assert store.jobs.get(job_id).completed_at
    assert group_of(store, job_id) is None


def test_worker_that_lives_on_clears_its_suspects(store: Store) -> None:
    suspects, others = [create(store) for _ in range(3)], [create(store), create(store)]
    lose(store, suspects, "suspended")
    lose(store, others, "dead")
    store.workers.register("suspended", concurrency=4, **SERVES)
    assert {group_of(store, job_id) for job_id in suspects} == {None}
    assert groups(store, others) == [1, 1]


def test_first_worker_yields_to_suspects_that_wait(store: Store, engine: Engine) -> None:
    suspect, running, waiting = (create(store) for _ in range(3))
    lose(store, [suspect])
    for worker in ("worker-1", "worker-2"):
        store.workers.register(worker, concurrency=4, **SERVES)
    claim(store, running, "worker-1")
    assert not store.leases.must_yield("worker-1", **SERVES)
    put(engine, suspect, queued_at=store.jobs.get(suspect).queued_at - 31)
    assert store.leases.must_yield("worker-1", **SERVES)
    assert not store.leases.must_yield("worker-2", **SERVES)
    assert claimed_id(store) is None, "it empties itself"
    store.jobs.cancel(running)
    assert sweep(store, renotify_seconds=-1) == [waiting]
    claim(store, waiting, "worker-2")
    lease = Lease(running, "worker-1", 1, 1, 1, 3, 30)
    store.leases.finish(lease, Outcome("completed"))
    assert claimed_id(store) == suspect
    assert not store.leases.must_yield("worker-1", **SERVES)


def test_suspect_without_capacity_stops_nobody(store: Store) -> None:
    tenant = store.for_tenant("limited")
    suspect, running, other = create(tenant), create(tenant), create(store)
    lose(store, [suspect])
    store.tenants.set_limits("limited", Limits(running=1))
    store.workers.register("worker-1", concurrency=4, **SERVES)
    claim(store, running, "worker-2")
    rules = Rules(suspect_patience=-1)
    assert not store.leases.must_yield("worker-1", rules=rules, **SERVES)
    assert claimed_id(store, rules=rules) == other


def test_paused_queue_holds_suspects_back(store: Store) -> None:
    suspect = create(store)
    lose(store, [suspect])
    store.queues.pause("policy")
    assert claimed_id(store) is None
    assert sweep(store, renotify_seconds=-1) == []
    assert store.queues.resume("policy") == [suspect]
    assert claimed_id(store) == suspect


def test_waiting_suspects_are_notified_and_counted(store: Store) -> None:
    suspects = [create(store), create(store)]
    lose(store, suspects)
    (notified,) = sweep(store, renotify_seconds=-1)
    assert notified in suspects
    assert store.queues.next_waiting("policy", "reward") in suspects
    (queue,) = store.queues.page(60)
    assert (queue.waiting, queue.quarantined) == (2, 2)


@dataclass
class CrashingWorker:
    """A worker of 16 slots that dies when it runs the poison job."""

    store: Store
    poison: str
    deaths: int = 0
    running: dict[str, tuple[Lease, State]] = field(default_factory=dict)

    def work(self) -> None:
        """Fill the slots and make one call for each job, or die."""
        name = f"worker-{self.deaths}"
        while len(self.running) < 16 and (claimed := self.store.leases.claim(name, 30, **SERVES)):
            self.running[claimed.lease.job_id] = (claimed.lease, claimed.state)
        if self.poison in self.running:
            self.deaths += 1
            self.store.leases.renew(name, list(self.running), -1)
            sweep(self.store)
            self.running.clear()
            return
        for job_id, (lease, state) in list(self.running.items()):
            step = make_step(state)
            self.store.leases.checkpoint(lease, step)
            self.running[job_id] = (lease, step.after)
            if len(step.after.calls) == 3:
                self.store.leases.finish(lease, Outcome("completed"))
                del self.running[job_id]
            elif lease.quarantine:
                self.store.leases.release(lease)
                del self.running[job_id]


def test_poison_among_16_fails_alone(store: Store, engine: Engine) -> None:
    job_ids = [create(store) for _ in range(16)]
    worker = CrashingWorker(store, poison=job_ids[9])
    for _ in range(40):
        worker.work()
        for job in map(store.jobs.get, job_ids):
            if job.status == "queued":
                put(engine, job.id, next_attempt_at=None)  # its back-off is over
    ends = {job_id: store.jobs.get(job_id).status for job_id in job_ids}
    assert ends == {job_id: "failed" if job_id == worker.poison else "completed" for job_id in job_ids}
    failed = store.jobs.get(worker.poison)
    assert (failed.error_code, failed.attempt) == ("worker_lost", 3)
    assert worker.deaths == 2 + 3
