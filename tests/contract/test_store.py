"""The store, on both databases: operations of one client and one worker."""

from typing import Any, get_args

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from testing.fakes import FakePolicy, FakeReward, make_step, new_state, sample_text, tagged
from testing.jobs import SERVES, claim, claim_one, create, drive, event_types, execute, put, rows
from tpo.core.errors import JobNotFoundError, LeaseLostError, NoUsableSampleError
from tpo.core.ports import Generate, Text
from tpo.core.state import Message, RewardPart, State
from tpo.core.status import TERMINAL, Status
from tpo.jobs.leases import Flags
from tpo.jobs.outcomes import Outcome
from tpo.store import Store

STATUSES: tuple[Status, ...] = get_args(Status)


def test_submit_stores_new_job(store: Store) -> None:
    state = new_state("Hello \x00 $query {braces} 🎉", sample_size=3, seed=2**63 - 1)
    job = store.jobs.submit(state, max_attempts=4, metadata={"team": "a"}, deadline_seconds=60, **SERVES).job
    assert (job.status, job.attempt, job.fence, job.max_attempts) == ("queued", 0, 0, 4)
    assert job.metadata == {"team": "a"}
    assert job.deadline_at == pytest.approx(job.created_at + 60, abs=1)
    assert event_types(store, job.id) == ["job.queued"]
    assert store.jobs.state(job.id) == state
    assert store.jobs.get(job.id) == job


def test_unknown_job_raises_not_found(store: Store) -> None:
    for query in (store.jobs.get, store.jobs.state, store.jobs.cancel):
        with pytest.raises(JobNotFoundError, match="job_no"):
            query("job_no")
    assert store.jobs.events("job_no") == []
    assert claim_one(store, "job_no", "worker-1", 30, **SERVES) is None


def test_page_lists_jobs_in_both_orders(store: Store) -> None:
    oldest_first = sorted(create(store) for _ in range(7))
    for job_id in oldest_first[2:4]:
        store.jobs.cancel(job_id)
    for order, expected in (("asc", oldest_first), ("desc", oldest_first[::-1])):
        seen: list[str] = []
        while page := store.jobs.page(limit=3, after=seen[-1] if seen else None, order=order):  # type: ignore[arg-type]
            assert len(page) <= 3
            seen += [job.id for job in page]
        assert seen == expected
    assert store.jobs.page(limit=3, after=oldest_first[-1], order="asc") == []
    assert store.jobs.page(limit=3, after=oldest_first[0], order="desc") == []
    assert [j.id for j in store.jobs.page(limit=9, order="asc", statuses=["cancelled"])] == oldest_first[2:4]
    assert len(store.jobs.page(limit=9, statuses=["cancelled", "queued"])) == 7
    assert store.jobs.page(limit=9, statuses=["failed"]) == []


def test_claim_takes_lease_and_raises_attempt_and_fence(store: Store) -> None:
    job_id = create(store)
    lease, state = claim(store, job_id, seconds=30)
    job = store.jobs.get(job_id)
    assert (lease.job_id, lease.worker, lease.fence, lease.attempt, lease.max_attempts) == (job_id, "worker-1", 1, 1, 3)
    assert (job.status, job.fence, job.attempt, job.lease_owner) == ("in_progress", 1, 1, "worker-1")
    assert (job.iteration, job.phase) == (0, "sampling")
    assert job.started_at is not None
    assert job.lease_until == pytest.approx(job.started_at + 30, abs=1)
    assert state == store.jobs.state(job_id)
    assert event_types(store, job_id) == ["job.queued", "job.started", "job.phase"]

    assert claim_one(store, job_id, "worker-2", 30, **SERVES) is None
    store.leases.release(lease, delay_seconds=0)
    second, _ = claim(store, job_id, "worker-2")
    assert (second.fence, second.attempt) == (2, 2)
    assert store.jobs.get(job_id).started_at == job.started_at


@pytest.mark.parametrize("serves", [SERVES | {"model": "other"}, SERVES | {"reward_model": "other"}])
def test_claim_skips_jobs_of_other_models(engine: Engine, store: Store, serves: dict[str, str]) -> None:
    job_id = create(store)
    before = rows(engine)
    assert claim_one(store, job_id, "worker-1", 30, **serves) is None
    assert rows(engine) == before


def test_claim_skips_ineligible_jobs(engine: Engine, store: Store) -> None:
    waits, tried, late, paused = (create(store) for _ in range(4))
    put(engine, waits, next_attempt_at=store.jobs.get(waits).created_at + 60)
    put(engine, tried, consecutive_failures=3)
    put(engine, late, deadline_at=store.jobs.get(late).created_at - 1)
    put(engine, paused, status="paused")
    before = rows(engine)
    for job_id in (waits, tried, late, paused):
        assert claim_one(store, job_id, "worker-1", 30, **SERVES) is None
    assert rows(engine) == before


def awkward(request: Generate, sample: int) -> Text:
    """Return a sample with characters that are difficult for databases and parsers; some are unusable."""
    texts = ["nul \x00 and \ud800", "'; DROP TABLE jobs; --", "", "cut", "🎉 \u202e %s $query {x}", "untagged"]
    text = texts[(sample + request.iteration) % len(texts)]
    if request.kind == "update" and text != "untagged":
        text = tagged(text)
    return sample_text(text or " ", "length" if text == "cut" else "stop")


@pytest.mark.parametrize("mode", ["tpo", "revision", "bon"])
@pytest.mark.parametrize("policy", [FakePolicy(), FakePolicy(awkward)], ids=["plain", "awkward"])
def test_checkpoint_round_trips_state(store: Store, mode: str, policy: FakePolicy) -> None:
    state = new_state(mode=mode, sample_size=6, max_iterations=3)
    job_id = create(store, state)
    lease, claimed = claim(store, job_id)
    assert claimed == state
    last = drive(store, lease, state, policy)
    job = store.jobs.get(job_id)
    assert last.best is not None
    assert (job.best_candidate, job.best_reward) == (last.best.id, last.best.reward)
    assert (job.input_tokens, job.output_tokens) == (last.usage.input_tokens, last.usage.output_tokens)
    assert (job.reward_tokens, job.phase) == (last.usage.reward_tokens, None)
    types = event_types(store, job_id)
    assert types.count("job.iteration.completed") == last.params.iterations + 1
    assert types.count("job.iteration.started") == last.params.iterations


def test_checkpoint_stores_reward_parts(store: Store, engine: Engine) -> None:
    def parts(text: str) -> tuple[RewardPart, ...]:
        return (
            RewardPart(name="quality", value=float(len(text)), weight=0.5),
            RewardPart(name="broken", value=None, weight=-1.0),
        )

    lease, state = claim(store, create(store))
    last = drive(store, lease, state, reward=FakeReward(parts=parts))
    assert all(c.parts == parts(c.text) for c in last.candidates)
    assert store.jobs.state(lease.job_id) == last
    execute(engine, "UPDATE candidates SET parts = NULL")
    assert all(c.parts == () for c in store.jobs.state(lease.job_id).candidates)


def test_checkpoint_stores_job_without_usable_sample(store: Store) -> None:
    lease, state = claim(store, create(store, new_state(sample_size=2)))
    with pytest.raises(NoUsableSampleError):
        drive(store, lease, state, FakePolicy(lambda _r, _s: sample_text("")))
    assert [c.unusable for c in store.jobs.state(lease.job_id).candidates] == ["empty"] * 4
    store.leases.release(lease)
    again, state = claim(store, lease.job_id)
    with pytest.raises(NoUsableSampleError):
        drive(store, again, state)


def test_submit_stores_conversation_with_system_message(store: Store) -> None:
    messages = (("system", "Be kind."), ("user", "Hello"), ("assistant", "Hello!"), ("user", "Where is it?"))
    state = new_state().model_copy(update={"input": tuple(Message(role=r, content=c) for r, c in messages)})
    assert store.jobs.state(create(store, state)) == state


def test_checkpoint_is_idempotent(engine: Engine, store: Store) -> None:
    lease, before = claim(store, create(store))
    made = make_step(before)
    store.leases.checkpoint(lease, made)
    first = rows(engine)
    assert store.leases.checkpoint(lease, made) == Flags(False, False)
    second = rows(engine)
    put(engine, lease.job_id, lease_until=0.0)
    with pytest.raises(IntegrityError):
        store.leases.checkpoint(lease, make_step(before, FakePolicy(lambda _r, _s: sample_text("another"))))
    assert {**second, "jobs": 0} == {**first, "jobs": 0}
    assert store.jobs.get(lease.job_id).last_event == len(store.jobs.events(lease.job_id))
    assert store.jobs.state(lease.job_id) == made.after
    assert store.jobs.get(lease.job_id).lease_until == 0.0


def test_lost_lease_cannot_write(engine: Engine, store: Store) -> None:
    job_id = create(store)
    lost, before = claim(store, job_id, seconds=-1)
    store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
    # Claimed by the same worker, so that only the fence distinguishes the two claims.
    held, state = claim(store, job_id, "worker-1")
    store.leases.checkpoint(held, make_step(state))
    before_writes = rows(engine)
    for write in (
        lambda: store.leases.checkpoint(lost, make_step(before)),
        lambda: store.leases.finish(lost, Outcome("completed", output="mine")),
        lambda: store.leases.release(lost),
        lambda: store.leases.release(lost, delay_seconds=3),
    ):
        with pytest.raises(LeaseLostError):
            write()
        assert rows(engine) == before_writes
    assert store.leases.renew("worker-2", [job_id], 30) == {}
    assert store.leases.check("worker-2", [job_id]) == {}
    assert rows(engine) == before_writes
    assert store.leases.renew("worker-1", [job_id], 30)[job_id][0] == held.fence


def test_renew_extends_held_leases_and_returns_flags(engine: Engine, store: Store) -> None:
    kept, cancelled, late, ended, other = (create(store, deadline_seconds=600) for _ in range(5))
    leases = {job_id: claim(store, job_id, seconds=1)[0] for job_id in (kept, cancelled, late, ended)}
    claim(store, other, "worker-2", seconds=1)
    untouched = store.jobs.get(other).lease_until
    store.jobs.cancel(cancelled)
    put(engine, late, deadline_at=1.0)
    store.leases.finish(leases[ended], Outcome("completed", output="done"))
    expected = {kept: (1, Flags(False, False)), cancelled: (1, Flags(True, False)), late: (1, Flags(False, True))}
    assert store.leases.check("worker-1", [*leases, other]) == expected
    assert store.leases.renew("worker-1", [*leases, other], 500) == expected
    for job_id in expected:
        assert (store.jobs.get(job_id).lease_until or 0) > store.jobs.get(job_id).created_at + 400
    assert store.jobs.get(other).lease_until == untouched
    assert store.leases.renew("worker-1", [], 30) == {}


def test_checkpoint_extends_lease_and_returns_flags(engine: Engine, store: Store) -> None:
    lease, state = claim(store, create(store), seconds=500)
    put(engine, lease.job_id, lease_until=1.0, deadline_at=1.0)
    made = make_step(state)
    assert store.leases.checkpoint(lease, made) == Flags(False, True)
    assert (store.jobs.get(lease.job_id).lease_until or 0) > store.jobs.get(lease.job_id).created_at + 400
    store.jobs.cancel(lease.job_id)
    assert store.leases.checkpoint(lease, make_step(made.after)) == Flags(True, True)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("completed", output="the answer"),
        Outcome("failed", error_code="bad_reply", error_message="what happened"),
        Outcome("cancelled"),
        Outcome("expired"),
        Outcome("incomplete", output="so far", incomplete_reason="deadline"),
    ],
    ids=lambda o: o.status,
)
def test_finish_stores_outcome(engine: Engine, store: Store, outcome: Outcome) -> None:
    lease, state = claim(store, create(store))
    store.leases.checkpoint(lease, made := make_step(state))
    assert store.leases.finish(lease, outcome) == outcome.status
    job = store.jobs.get(lease.job_id)
    stored: dict[str, Any] = {name: getattr(job, name) for name in vars(outcome)}
    assert stored == vars(outcome)
    assert job.completed_at is not None
    assert (job.lease_owner, job.lease_until, job.phase) == (None, None, None)
    assert event_types(store, job.id)[-1] == f"job.{outcome.status}"
    ended = rows(engine)
    for write in (
        lambda: store.leases.finish(lease, Outcome("completed", output="again")),
        lambda: store.leases.checkpoint(lease, make_step(made.after)),
        lambda: store.leases.release(lease),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert claim_one(store, job.id, "worker-1", 30, **SERVES) is None
    assert store.jobs.cancel(job.id).status == outcome.status
    assert store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60) == []
    assert rows(engine) == ended


def test_cancel_ends_waiting_job_and_requests_running_one(engine: Engine, store: Store) -> None:
    queued, paused, running = create(store), create(store), create(store)
    put(engine, paused, status="paused", phase="sampling")
    lease, state = claim(store, running)
    for job_id in (queued, paused):
        job = store.jobs.cancel(job_id)
        assert (job.status, job.phase) == ("cancelled", None)
        assert job.completed_at is not None
        assert job.cancel_requested_at is not None
        assert event_types(store, job_id)[-1] == "job.cancelled"
    job = store.jobs.cancel(running)
    assert (job.status, job.completed_at) == ("cancelling", None)
    requested = rows(engine)
    assert store.jobs.cancel(running).status == "cancelling"
    assert rows(engine) == requested
    store.leases.checkpoint(lease, make_step(state))
    assert store.leases.finish(lease, Outcome("completed", output="too late")) == "cancelled"
    assert store.jobs.get(running).output is None
    types = event_types(store, running)
    assert (types.count("job.cancelling"), types[-1]) == (1, "job.cancelled")


def test_release_without_delay_returns_attempt(store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.leases.release(lease)
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt, job.fence, job.next_attempt_at) == ("queued", 0, 1, None)
    assert (job.lease_owner, job.lease_until) == (None, None)
    assert event_types(store, job.id)[-1] == "job.retrying"
    assert claim(store, job.id, "worker-2")[0].attempt == 1


def test_release_with_delay_counts_attempt_and_waits(engine: Engine, store: Store) -> None:
    lease, _ = claim(store, create(store))
    store.leases.release(lease, delay_seconds=60)
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt) == ("queued", 1)
    assert job.next_attempt_at is not None
    assert claim_one(store, job.id, "worker-2", 30, **SERVES) is None
    assert store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60) == []
    put(engine, job.id, next_attempt_at=job.created_at)
    due = [store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60) for _ in range(2)]
    assert [[wake_up.job_id for wake_up in wake_ups] for wake_ups in due] == [[job.id], []]
    assert claim(store, job.id, "worker-2")[0].attempt == 2


def test_release_ends_cancelled_job(store: Store) -> None:
    for delay in (None, 5.0):
        lease, _ = claim(store, create(store))
        store.jobs.cancel(lease.job_id)
        store.leases.release(lease, delay_seconds=delay)
        assert store.jobs.get(lease.job_id).status == "cancelled"


def test_workers_register_and_deregister(engine: Engine, store: Store) -> None:
    store.workers.register("worker-1", concurrency=4, **SERVES)
    store.workers.register("worker-2", concurrency=2, **SERVES)
    store.workers.register("worker-1", concurrency=8, **SERVES)
    assert {(w.id, w.concurrency) for w in store.workers.live(60)} == {("worker-1", 8), ("worker-2", 2)}
    store.workers.deregister("worker-2")
    assert [w.id for w in store.workers.live(60)] == ["worker-1"]
    assert store.workers.live(-1) == []


def test_events_are_paged_by_number(store: Store) -> None:
    lease, state = claim(store, create(store))
    drive(store, lease, state)
    numbers = [e.number for e in store.jobs.events(lease.job_id)]
    assert [e.number for e in store.jobs.events(lease.job_id, after=3, limit=2)] == [4, 5]
    assert store.jobs.events(lease.job_id, after=numbers[-1]) == []


def ended_in(store: Store, engine: Engine, status: Status) -> tuple[str, State]:
    """Return the id and the state of a job with a record that ended in this status."""
    lease, state = claim(store, create(store))
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    store.leases.finish(lease, Outcome(status))
    return lease.job_id, after


@pytest.mark.parametrize("status", TERMINAL)
def test_triggers_protect_ended_jobs(engine: Engine, store: Store, status: Status) -> None:
    job_id, _ = ended_in(store, engine, status)
    before = rows(engine)
    for other in STATUSES:
        if other != status:
            with pytest.raises(IntegrityError, match="a terminal status never changes"):
                put(engine, job_id, status=other)
    put(engine, job_id, status=status)  # setting the same status is not a change
    for insert in (
        "INSERT INTO calls VALUES (:id, 9, 'critique', 1, 1, 1, 1, 1.0)",
        "INSERT INTO candidates VALUES (:id, 9, 9, 'text', 1, 1.0, NULL, NULL)",
        "INSERT INTO iterations VALUES (:id, 9, '0-0', NULL, NULL, 0, NULL, 0)",
    ):
        with pytest.raises(IntegrityError, match="nothing is recorded of a job that has ended"):
            execute(engine, insert, id=job_id)
    with pytest.raises(IntegrityError):
        put(engine, create(store), status="no such status")
    assert {**rows(engine), "jobs": 0, "events": 0} == {**before, "jobs": 0, "events": 0}
    assert store.jobs.get(job_id).status == status
