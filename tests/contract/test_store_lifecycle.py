"""Pause, resume, retry, extend and delete, on both databases."""

import random
from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import Engine

from testing.fakes import FakePolicy, FakeReward, make_step, new_state, proceed, step
from testing.jobs import SERVES, claim, claim_one, create, drive, event_types, put, rows
from tests.support.concurrency import run_together
from tpo.core.errors import JobNotFoundError, WrongStateError
from tpo.core.run import run
from tpo.core.state import State
from tpo.core.status import TERMINAL, Status
from tpo.jobs.leases import Flags
from tpo.jobs.lifecycle import extended, retried
from tpo.jobs.outcomes import Outcome, outcome_of_run
from tpo.jobs.view import JobView
from tpo.store import Store


def sweep(store: Store) -> list[str]:
    """Run one sweep and return the ids of the jobs to notify workers of."""
    return [wake_up.job_id for wake_up in store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)]


def continue_from(store: Store, job_id: str, state: State) -> JobView:
    """Create a job that continues from the state of another one."""
    made = store.jobs.create_from(
        job_id, state, idempotency=None, limits=None, max_attempts=3, model="policy", reward_model="reward"
    )
    return made.job


def test_queued_job_pauses_at_once_and_resumes(engine: Engine, store: Store) -> None:
    job_id = create(store)
    assert store.jobs.pause(job_id).status == "paused"
    paused = rows(engine)
    assert store.jobs.pause(job_id).status == "paused"
    assert claim_one(store, job_id, "worker-1", 30, **SERVES) is None
    assert store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60) == []
    assert rows(engine) == paused
    assert store.jobs.resume(job_id).status == "queued"
    assert store.jobs.resume(job_id).status == "queued"
    assert event_types(store, job_id) == ["job.queued", "job.paused", "job.resumed"]
    assert claim(store, job_id)


def test_running_job_pauses_on_release(store: Store) -> None:
    lease, state = claim(store, create(store))
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    job = store.jobs.pause(lease.job_id)
    assert (job.status, job.pause_requested_at is not None) == ("in_progress", True)
    assert store.leases.check("worker-1", [lease.job_id])[lease.job_id][1] == Flags(False, False, True)
    assert store.leases.release(lease) == "paused"
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt, job.pause_requested_at, job.lease_owner) == ("paused", 0, None, None)
    assert event_types(store, job.id)[-1] == "job.paused"
    store.jobs.resume(job.id)
    again, resumed = claim(store, job.id, "worker-2")
    assert (again.attempt, resumed) == (1, after)


def test_resume_withdraws_pause_request(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.jobs.pause(lease.job_id)
    assert store.jobs.resume(lease.job_id).pause_requested_at is None
    assert store.leases.check("worker-1", [lease.job_id])[lease.job_id][1] == Flags(False, False)
    assert store.leases.release(lease) == "queued"


@pytest.mark.parametrize("how", ["failed attempt", "lost worker"])
def test_pause_request_outlives_worker(store: Store, how: str) -> None:
    lease, _ = claim(store, create(store), seconds=-1)
    store.jobs.pause(lease.job_id)
    if how == "lost worker":
        assert sweep(store) == []
    else:
        assert store.leases.release(lease, delay_seconds=5) == "paused"
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt, job.pause_requested_at) == ("paused", 1, None)
    store.jobs.resume(job.id)


def test_paused_job_can_expire_or_be_cancelled(engine: Engine, store: Store) -> None:
    late, unwanted = create(store, deadline_seconds=600), create(store)
    for job_id in (late, unwanted):
        store.jobs.pause(job_id)
    put(engine, late, deadline_at=1.0)
    sweep(store)
    assert store.jobs.get(late).status == "expired"
    assert store.jobs.cancel(unwanted).status == "cancelled"


def test_cancel_overrides_pause(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.jobs.pause(lease.job_id)
    assert store.jobs.cancel(lease.job_id).pause_requested_at is None
    for change in (store.jobs.pause, store.jobs.resume):
        with pytest.raises(WrongStateError):
            change(lease.job_id)
    assert store.leases.release(lease) == "cancelled"


@pytest.mark.parametrize("status", TERMINAL)
def test_ended_job_cannot_be_paused_or_resumed(engine: Engine, store: Store, status: Status) -> None:
    lease, _ = claim(store, create(store))
    store.leases.finish(lease, Outcome(status))
    before = rows(engine)
    for change in (store.jobs.pause, store.jobs.resume, store.jobs.retry_now):
        with pytest.raises(WrongStateError):
            change(lease.job_id)
    assert rows(engine) == before


def test_pause_and_resume_race_with_work(store: Store) -> None:
    for _ in range(10):
        lease, state = claim(store, create(store, new_state(sample_size=1, max_iterations=1)))
        actions: list[Callable[[], object]] = [
            partial(store.jobs.pause, lease.job_id),
            partial(store.jobs.resume, lease.job_id),
            partial(store.leases.checkpoint, lease, make_step(state)),
            partial(store.leases.release, lease),
        ]
        random.shuffle(actions)
        run_together(*actions)
        job = store.jobs.get(lease.job_id)
        assert job.status in ("queued", "paused")
        types = event_types(store, job.id)
        assert types.count("job.paused") - types.count("job.resumed") == (job.status == "paused")


def test_retry_now_ends_back_off(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.leases.release(lease, delay_seconds=500)
    assert claim_one(store, lease.job_id, "worker-1", 30, **SERVES) is None
    assert store.jobs.retry_now(lease.job_id).next_attempt_at is None
    assert claim(store, lease.job_id)[0].attempt == 2


def test_retried_job_continues_from_record(store: Store) -> None:
    lease, state = claim(store, create(store))
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    store.leases.finish(lease, Outcome("failed", error_code="worker_lost", error_message="lost"))
    old = store.jobs.get(lease.job_id)
    new = continue_from(store, old.id, retried(old, store.jobs.state(old.id)))
    assert (new.status, new.source_id, new.input_tokens) == ("queued", old.id, 0)
    assert store.jobs.state(new.id) == after.model_copy(update={"calls": ()})
    assert store.jobs.get(old.id).status == "failed"
    with pytest.raises(WrongStateError):
        retried(new, state)


def test_retry_without_usable_sample_changes_seed(store: Store) -> None:
    lease, state = claim(store, create(store))
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    store.leases.finish(lease, Outcome("failed", error_code="no_usable_sample", error_message="none"))
    again = retried(store.jobs.get(lease.job_id), after)
    assert again.candidates == ()
    assert again.params.seed != after.params.seed


@pytest.mark.parametrize("mode", ["tpo", "revision"])
def test_extended_job_equals_longer_job(store: Store, mode: str) -> None:
    lease, state = claim(store, create(store, new_state(mode=mode, sample_size=3, max_iterations=1, seed=5)))
    ended = drive(store, lease, state)
    store.leases.finish(lease, Outcome("completed", output="short"))
    old = store.jobs.get(lease.job_id)
    more = extended(old, ended, 2)
    made = continue_from(store, old.id, more)
    assert (made.iteration, made.best_candidate, made.best_reward) == (2, old.best_candidate, old.best_reward)
    held, begun = claim(store, made.id)
    assert begun.calls == ()
    last = drive(store, held, begun)
    uninterrupted = run(
        new_state(mode=mode, sample_size=3, max_iterations=3, seed=5),
        FakePolicy(),
        FakeReward(),
        lambda _s: None,
        proceed,
    )
    assert (last.candidates, last.iterations) == (uninterrupted.candidates, uninterrupted.iterations)
    assert last.calls[-1].number == len(last.calls) == len(uninterrupted.calls) - len(ended.calls)
    assert store.jobs.state(old.id) == ended


def falling_reward(text: str) -> float:
    """Return a reward that falls with each iteration."""
    return -float(text.split()[1].partition("-")[0])


def test_decline_is_recorded_and_published(store: Store) -> None:
    lease, state = claim(store, create(store, new_state(sample_size=2, max_iterations=2)))
    seen = []
    for _ in range(10):
        made = make_step(state, reward=FakeReward(falling_reward))
        store.leases.checkpoint(lease, made)
        state = made.after
        seen.append(store.jobs.get(lease.job_id).declined_iteration)
    assert seen == [None] * 5 + [1] * 4 + [2]
    events = [e for e in store.jobs.events(lease.job_id) if e.type == "job.iteration.declined"]
    assert [e.data for e in events] == [
        {"iteration": 1, "mean_reward": -1.0, "mean_reward_before": 0.0},
        {"iteration": 2, "mean_reward": -2.0, "mean_reward_before": -1.0},
    ]
    types = event_types(store, lease.job_id)
    assert types[types.index("job.iteration.declined") - 1] == "job.iteration.completed"


def test_early_stopped_job_can_be_extended(store: Store) -> None:
    rule = {"patience": 1, "min_gain": 1000.0}
    lease, state = claim(store, create(store, new_state(sample_size=2, max_iterations=3, early_stop=rule)))
    ended = drive(store, lease, state)
    assert len(ended.iterations) == 1
    store.leases.finish(lease, outcome_of_run(ended))
    old = store.jobs.get(lease.job_id)
    assert (old.status, old.stop_reason) == ("completed", "early_stop")
    made = continue_from(store, old.id, extended(old, ended, 1))
    assert (made.iteration, made.phase, made.stop_reason) == (2, "critique", None)
    held, begun = claim(store, made.id)
    assert len(drive(store, held, begun).iterations) == 2


def test_budget_within_iteration_leaves_it_incomplete(store: Store) -> None:
    state = new_state(sample_size=2, max_iterations=2, max_seconds=0.4)
    lease, state = claim(store, create(store, state))
    ended = drive(store, lease, state)
    assert [c.kind for c in ended.calls] == ["sample", "score", "critique"]
    store.leases.finish(lease, outcome_of_run(ended))
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.incomplete_reason, job.iteration) == ("incomplete", "max_seconds", 1)
    types = event_types(store, job.id)
    assert types.count("job.iteration.completed") == 1
    again = continue_from(store, job.id, retried(job, ended))
    held, begun = claim(store, again.id)
    assert [c.kind for c in drive(store, held, begun).calls] == ["gradient", "update", "score"]


def test_cancelled_job_has_no_stop_reason(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.jobs.cancel(lease.job_id)
    store.leases.finish(lease, Outcome("completed", output="x", stop_reason="decline"))
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.stop_reason) == ("cancelled", None)
    assert store.jobs.events(job.id)[-1].data == {}


def test_extend_refuses_ineligible_jobs(store: Store) -> None:
    lease, state = claim(store, create(store))
    with pytest.raises(WrongStateError):
        extended(store.jobs.get(lease.job_id), state, 1)
    store.leases.finish(lease, Outcome("cancelled"))
    job = store.jobs.get(lease.job_id)
    with pytest.raises(WrongStateError, match="no candidate"):
        extended(job, state, 1)
    scored = step(step(state))
    with pytest.raises(WrongStateError, match="at most 3"):
        extended(job, scored, 3, most=3)
    with pytest.raises(WrongStateError, match="best-of-N"):
        extended(job, scored.model_copy(update={"params": scored.params.model_copy(update={"mode": "bon"})}), 1)


def test_delete_removes_all_rows_of_job(engine: Engine, store: Store) -> None:
    empty = rows(engine)
    lease, state = claim(store, create(store))
    with pytest.raises(WrongStateError):
        store.jobs.delete(lease.job_id)
    drive(store, lease, state)
    store.leases.finish(lease, Outcome("completed", output="the answer"))
    with pytest.raises(JobNotFoundError):
        store.for_tenant("other").jobs.delete(lease.job_id)
    store.jobs.delete(lease.job_id)
    assert rows(engine) == empty
    with pytest.raises(JobNotFoundError):
        store.jobs.delete(lease.job_id)


def test_new_events_lists_events_and_deleted_jobs(store: Store) -> None:
    first, second = create(store), create(store)
    claim(store, first)
    found = store.events.new_events({first: 1, second: 1, "job_none": 0})
    assert [(e.job_id, e.number) for e in found.events] == [(first, 2), (first, 3)]
    assert found.deleted_jobs == {"job_none"}
    assert store.events.new_events({}).events == ()
    assert len(store.events.new_events({**{f"job_{i}": 0 for i in range(1000)}, second: 0}).events) == 1
