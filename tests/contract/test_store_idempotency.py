"""Idempotent requests, quotas and retention, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from testing.fakes import new_state
from testing.jobs import claim, create, execute, rows
from testing.seeding import seed_database
from tpo.core.errors import ExternalIdTakenError, IdempotencyConflictError, JobNotFoundError, QuotaExceededError
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome
from tpo.jobs.requests import Submitted
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.idempotency import IdempotencyRequest
from tpo.tenants.tenants import Limits
from worker.tasks.cleaner import Cleaner

STATE = new_state(sample_size=2)


def submit(
    store: Store, once: IdempotencyRequest | None = None, limits: Limits | None = None, external_id: str | None = None
) -> Submitted:
    """Submit a job."""
    return store.jobs.submit(
        STATE,
        idempotency=once,
        limits=limits,
        max_attempts=3,
        external_id=external_id,
        model="policy",
        reward_model="reward",
    )


def test_same_key_and_body_return_first_job(engine: Engine, store: Store) -> None:
    first = submit(store, IdempotencyRequest("body", "key"))
    before = rows(engine)
    second = submit(store, IdempotencyRequest("body", "key"))
    assert (first.new, second.new, second.job.id) == (True, False, first.job.id)
    with pytest.raises(IdempotencyConflictError):
        submit(store, IdempotencyRequest("another body", "key"))
    assert rows(engine) == before
    assert submit(store.for_tenant("acme"), IdempotencyRequest("another body", "key")).new
    assert submit(store, IdempotencyRequest("body", "another key")).new


def test_idempotency_key_expires_or_goes_with_its_job(engine: Engine, store: Store) -> None:
    first = submit(store, IdempotencyRequest("body", "key"))
    execute(engine, "UPDATE idempotency_keys SET created_at = created_at - 100")
    assert not submit(store, IdempotencyRequest("body", "key", keep_seconds=200)).new
    second = submit(store, IdempotencyRequest("other", "key", keep_seconds=50))
    assert second.new
    store.jobs.cancel(second.job.id)
    store.jobs.delete(second.job.id)
    assert submit(store, IdempotencyRequest("third", "key")).new
    assert store.jobs.get(first.job.id)


def test_external_id_is_unique_per_tenant(engine: Engine, store: Store) -> None:
    first = submit(store, IdempotencyRequest("body"), external_id="mine")
    before = rows(engine)
    assert submit(store, IdempotencyRequest("body"), external_id="mine").job.id == first.job.id
    for other in (IdempotencyRequest("another body"), None):
        with pytest.raises(ExternalIdTakenError):
            submit(store, other, external_id="mine")
    assert rows(engine) == before
    assert submit(store.for_tenant("acme"), IdempotencyRequest("body"), external_id="mine").new
    assert [submit(store, IdempotencyRequest("body")).new for _ in range(2)] == [True, True]


def test_concurrent_equal_requests_create_one_job(store: Store) -> None:
    with ThreadPoolExecutor(16) as threads:
        by_key = list(threads.map(lambda _i: submit(store, IdempotencyRequest("body", "key")), range(48)))
        by_name = list(threads.map(lambda _i: submit(store, IdempotencyRequest("body"), external_id="mine"), range(48)))
    for made in (by_key, by_name):
        assert len({each.job.id for each in made}) == 1
        assert sum(each.new for each in made) == 1
    assert len(store.jobs.page(limit=9)) == 2


def end(store: Store, job_id: str) -> None:
    """Claim a job and fail it."""
    held: Lease = claim(store, job_id)[0]
    store.leases.finish(held, Outcome("failed", error_code="x", error_message="x"))


def test_in_flight_limit_counts_per_tenant(engine: Engine, store: Store) -> None:
    limits = Limits(in_flight=2)
    first = submit(store, limits=limits).job
    claim(store, submit(store, IdempotencyRequest("body", "key"), limits).job.id)
    before = rows(engine)
    with pytest.raises(QuotaExceededError) as refused:
        submit(store, limits=limits)
    assert (refused.value.code, refused.value.limit) == ("too_many_jobs_in_flight", 2)
    assert rows(engine) == before
    assert not submit(
        store, IdempotencyRequest("body", "key"), limits
    ).new  # a repeated request that was accepted is not refused
    assert submit(store.for_tenant("acme"), limits=limits).new
    end(store, first.id)
    assert submit(store, limits=limits).new


def test_rate_limit_counts_jobs_per_minute(engine: Engine, store: Store) -> None:
    limits = Limits(per_minute=3)
    statuses = [submit(store, limits=limits).rate_limit for _ in range(3)]
    assert [(status.limit, status.remaining) for status in statuses if status] == [(3, 2), (3, 1), (3, 0)]
    with pytest.raises(QuotaExceededError) as refused:
        submit(store, limits=limits)
    assert refused.value.code == "rate_limit_exceeded"
    assert 0 < refused.value.retry_after <= 60
    oldest = store.jobs.page(limit=1, order="asc")[0].id
    end(store, oldest)
    with pytest.raises(QuotaExceededError):
        submit(store, limits=limits)
    early = f"job_{int(oldest[4:16], 16) - 61_000:012x}{oldest[16:]}"
    for table in ("events",):
        execute(engine, f"DELETE FROM {table} WHERE job_id = '{oldest}'")
    execute(engine, f"UPDATE jobs SET id = '{early}' WHERE id = '{oldest}'")
    assert submit(store, limits=limits).new


def test_tenant_limits_override_defaults(store: Store) -> None:
    store.tenants.set_limits("acme", Limits(in_flight=1))
    acme = store.for_tenant("acme")
    for defaults in (Limits(), Limits(in_flight=100)):
        job = submit(acme, limits=defaults).job
        with pytest.raises(QuotaExceededError):
            submit(acme, limits=defaults)
        acme.jobs.cancel(job.id)
    store.tenants.set_limits("acme", Limits())
    assert [submit(acme, limits=Limits()).new for _ in range(3)] == [True] * 3


def test_concurrent_submits_respect_in_flight_limit(store: Store) -> None:
    def try_submit(_i: int) -> bool:
        try:
            return submit(store, limits=Limits(in_flight=5)).new
        except QuotaExceededError:
            return False

    with ThreadPoolExecutor(12) as threads:
        assert sum(threads.map(try_submit, range(24))) == 5


def test_purge_removes_old_ended_jobs_only(engine: Engine, store: Store) -> None:
    old, fresh, live, running, held, unwanted = (create(store) for _ in range(6))
    for job_id in (old, fresh):
        end(store, job_id)
    claim(store, running)
    claim(store, unwanted)
    store.jobs.pause(held)
    store.jobs.cancel(unwanted)
    execute(engine, f"UPDATE jobs SET completed_at = completed_at - 1000 WHERE id = '{old}'")
    # Live jobs get an old end time, but only the status decides.
    execute(engine, f"UPDATE jobs SET completed_at = 1 WHERE id <> '{old}' AND id <> '{fresh}'")
    submit(store, IdempotencyRequest("body", "key"))
    execute(engine, "UPDATE idempotency_keys SET created_at = 1")
    assert store.idempotency_keys.purge(60) == 1
    assert rows(engine)["idempotency_keys"] == []
    assert store.maintenance.purge(500) == 1
    assert store.maintenance.purge(500) == 0
    with pytest.raises(JobNotFoundError):
        store.jobs.get(old)
    assert old not in str(rows(engine))
    statuses = [store.jobs.get(job_id).status for job_id in (fresh, live, running, held, unwanted)]
    assert statuses[1:] == ["queued", "in_progress", "paused", "cancelling"]


def test_cleaner_purges_until_nothing_is_left(engine: Engine, store: Store) -> None:
    seed_database(engine, 300)
    Cleaner(Settings(retention_days=1e-9, idempotency_hours=1e-9), store).purge()
    assert {job.status for job in store.jobs.page(limit=300)} == {"queued"}
    left = rows(engine)
    assert left["idempotency_keys"] == []
    assert len(left["jobs"]) == len(left["events"]) == len(left["job_metadata"]) == 300 // 20
    assert left["candidates"] == left["calls"] == left["iterations"] == []
