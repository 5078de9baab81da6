"""An attempt that ended because its worker could not reach the database does not count."""

import pytest

from testing.fakes import make_step
from testing.jobs import claim, create, put, rows
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


def expire(store: Store, job_id: str) -> None:
    put(store.engine, job_id, lease_until=1.0)
    store.maintenance.sweep(renotify_seconds=1, worker_retention_seconds=60)


def test_forgive_takes_back_a_rescued_attempt(store: Store) -> None:
    job_id = create(store, max_attempts=2)
    for _ in range(5):
        put(store.engine, job_id, next_attempt_at=None)
        lease, _ = claim(store, job_id)
        expire(store, job_id)
        store.leases.forgive(lease)
        store.leases.forgive(lease)
        job = store.jobs.get(job_id)
        assert (job.status, job.attempt, job.consecutive_failures) == ("queued", 0, 0)


def test_forgive_hands_back_a_held_job(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.leases.forgive(lease)
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt, job.consecutive_failures, job.lease_owner) == ("queued", 0, 0, None)


@pytest.mark.parametrize("since", ["claimed", "advanced", "completed"])
def test_forgive_changes_nothing_after_another_claim(store: Store, since: str) -> None:
    lease, _ = claim(store, create(store))
    expire(store, lease.job_id)
    put(store.engine, lease.job_id, next_attempt_at=None)
    second, state = claim(store, lease.job_id, "worker-2")
    if since == "advanced":
        store.leases.checkpoint(second, make_step(state))
    elif since == "completed":
        store.leases.finish(second, Outcome("completed", output="done"))
    before = rows(store.engine)
    store.leases.forgive(lease)
    assert rows(store.engine) == before
