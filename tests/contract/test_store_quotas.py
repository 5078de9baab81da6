"""Quota of stored bytes: the inputs of a tenant's jobs and its files, on both databases."""

import pytest

from testing.fakes import new_state
from tests.support.concurrency import run_together
from tpo.core.errors import QuotaExceededError
from tpo.core.state import Message
from tpo.store import Store
from tpo.tenants.tenants import Limits

SERVES = {"model": "scripted", "reward_model": "scripted", "max_attempts": 3}


def submit(store: Store, size: int, limits: Limits) -> str:
    """Submit a job whose input has this number of bytes."""
    state = new_state().model_copy(update={"input": (Message(role="user", content="é" * (size // 2)),)})
    return store.jobs.submit(state, limits=limits, **SERVES).job.id  # type: ignore[arg-type]


def upload(store: Store, size: int, limits: Limits) -> str:
    file_id = store.files.begin("a.jsonl", "batch")
    store.files.append_part(file_id, b"x" * size)
    try:
        return store.files.complete(file_id, limits=limits).id
    except QuotaExceededError:
        store.files.discard(file_id)
        raise


def refusal(store: Store, size: int, limits: Limits) -> QuotaExceededError:
    with pytest.raises(QuotaExceededError) as caught:
        submit(store, size, limits)
    return caught.value


def test_inputs_and_files_count_against_the_quota(store: Store) -> None:
    limits = Limits(stored_bytes=1000)
    job_id = submit(store, 400, limits)
    file_id = upload(store, 500, limits)
    error = refusal(store, 102, limits)
    assert (error.status, error.code, error.limit, error.remaining) == (429, "too_many_stored_bytes", 1000, 100)
    with pytest.raises(QuotaExceededError):
        upload(store, 101, limits)
    submit(store, 100, limits)
    store.files.delete(file_id)
    submit(store, 500, limits)
    refusal(store, 2, limits)
    store.jobs.cancel(job_id)
    store.jobs.delete(job_id)
    submit(store, 400, limits)


def test_refused_job_and_file_leave_nothing(store: Store) -> None:
    limits = Limits(stored_bytes=10)
    refusal(store, 12, limits)
    with pytest.raises(QuotaExceededError):
        upload(store, 11, limits)
    assert store.jobs.page(limit=9) == []
    assert store.files.page(limit=9, after=None, order="desc", purpose=None) == []
    submit(store, 10, limits)


def test_tenants_have_their_own_quota(store: Store) -> None:
    limits = Limits(stored_bytes=100)
    submit(store, 100, limits)
    other = store.for_tenant("other")
    submit(other, 100, limits)
    store.tenants.set_limits("other", Limits(stored_bytes=10**12))
    submit(other, 100, limits)
    refusal(store, 2, limits)
    submit(store, 100, Limits())


def test_concurrent_submissions_do_not_exceed_the_quota(store: Store) -> None:
    def attempt() -> bool:
        try:
            submit(store, 100, Limits(stored_bytes=500))
        except QuotaExceededError:
            return False
        return True

    assert run_together(*[attempt] * 10).count(True) == 5
