"""The rescuer, on both databases: lost workers, deadlines and notifications; and invariants for any sequence."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from testing.fakes import make_step, new_state
from testing.jobs import SERVES, claim, claim_one, create, drive, event_types, put, rows
from tpo.core.errors import LeaseLostError, WrongStateError
from tpo.core.state import State
from tpo.core.status import TERMINAL
from tpo.jobs.leases import Lease
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


def sweep(store: Store, renotify_seconds: float = 60) -> list[str]:
    """Run one sweep and return the ids of the jobs to notify workers of."""
    wake_ups = store.maintenance.sweep(renotify_seconds=renotify_seconds, worker_retention_seconds=60)
    assert all(wake_up.model == "policy" for wake_up in wake_ups)
    return [wake_up.job_id for wake_up in wake_ups]


def test_idle_sweep_changes_nothing(engine: Engine, store: Store) -> None:
    create(store)
    claim(store, create(store))
    store.workers.register("worker-1", concurrency=1, **SERVES)
    before = rows(engine)
    assert sweep(store) == []
    assert rows(engine) == before


def test_sweep_requeues_and_notifies_lost_lease(store: Store) -> None:
    lease, state = claim(store, create(store), seconds=500)
    store.leases.checkpoint(lease, made := make_step(state))
    after = made.after
    assert sweep(store) == []
    store.leases.renew("worker-1", [lease.job_id], -1)
    assert sweep(store) == [lease.job_id]
    assert sweep(store) == []
    job = store.jobs.get(lease.job_id)
    assert (job.status, job.attempt, job.lease_owner, job.lease_until) == ("queued", 1, None, None)
    assert event_types(store, job.id)[-1] == "job.retrying"
    again, resumed = claim(store, job.id, "worker-2")
    assert (again.attempt, again.fence, resumed) == (2, 2, after)


def test_sweep_fails_job_after_last_lost_worker(store: Store) -> None:
    job_id = create(store, max_attempts=2)
    for attempt in (1, 2):
        assert claim(store, job_id, seconds=-1)[0].attempt == attempt
        assert sweep(store) == ([job_id] if attempt == 1 else [])
    job = store.jobs.get(job_id)
    assert (job.status, job.error_code, job.lease_owner) == ("failed", "worker_lost", None)
    assert job.completed_at is not None
    assert event_types(store, job_id)[-1] == "job.failed"
    assert claim_one(store, job_id, "worker-1", 30, **SERVES) is None


def test_sweep_spreads_retries_of_lost_jobs(store: Store) -> None:
    job_ids = [create(store, max_attempts=5) for _ in range(3)]
    for _ in range(2):
        for number, job_id in enumerate(job_ids):
            claim(store, job_id, f"worker-{number}", seconds=-1)
        sweep(store)
    due = {store.jobs.get(job_id).next_attempt_at for job_id in job_ids}
    assert len(due) == 3


def test_sweep_expires_unreadable_job_without_blocking_others(store: Store, engine: Engine) -> None:
    late, waiting = create(store, deadline_seconds=-1), create(store)
    put(engine, late, prompts={"of": "another version"})
    put(engine, waiting, queued_at=0)
    assert sweep(store) == [waiting]
    assert store.jobs.get(late).status == "expired"


def test_sweep_cancels_lost_job_being_cancelled(store: Store) -> None:
    lease, _ = claim(store, create(store), seconds=-1)
    store.jobs.cancel(lease.job_id)
    assert sweep(store) == []
    assert store.jobs.get(lease.job_id).status == "cancelled"
    assert event_types(store, lease.job_id)[-1] == "job.cancelled"


def test_sweep_ends_queued_job_past_deadline(engine: Engine, store: Store) -> None:
    unstarted = create(store, deadline_seconds=-1)
    started = create(store, deadline_seconds=600)
    lease, state = claim(store, started)
    last = drive(store, lease, state)
    store.leases.release(lease)
    in_time = create(store, deadline_seconds=600)
    assert sweep(store) == []
    assert store.jobs.get(unstarted).status == "expired"
    assert store.jobs.get(unstarted).output is None
    assert store.jobs.get(started).status == "queued"
    put(engine, started, deadline_at=1.0)
    sweep(store)
    job = store.jobs.get(started)
    assert last.best is not None
    assert (job.status, job.output, job.incomplete_reason) == ("incomplete", last.best.text, "deadline")
    assert event_types(store, started)[-1] == "job.incomplete"
    assert store.jobs.get(in_time).status == "queued"


def test_sweep_requeues_job_after_back_off(engine: Engine, store: Store) -> None:
    waits, due = (create(store) for _ in range(2))
    for job_id in (waits, due):
        store.leases.release(claim(store, job_id)[0], delay_seconds=600)
    assert sweep(store, renotify_seconds=-1) == []
    put(engine, due, next_attempt_at=1.0)
    assert store.leases.claim("worker-1", 30, **SERVES) is None, "the sweep requeues it first"
    assert sweep(store) == [due]
    assert store.jobs.get(due).next_attempt_at is None
    assert claim(store, due)[0].attempt == 2


def test_sweep_expires_lost_job_past_deadline(engine: Engine, store: Store) -> None:
    lease, _ = claim(store, create(store), seconds=-1)
    put(engine, lease.job_id, deadline_at=1.0)
    assert sweep(store) == []
    assert store.jobs.get(lease.job_id).status == "expired"


def test_sweep_repeats_lost_notifications(store: Store) -> None:
    jobs = sorted(create(store) for _ in range(3))
    claim(store, jobs[0])
    assert sweep(store) == []
    assert sweep(store, renotify_seconds=-1) == jobs[1:2]
    assert sweep(store) == []


def test_sweep_notifies_each_queue(engine: Engine, store: Store) -> None:
    jobs = sorted(create(store) for _ in range(6))
    for job_id in jobs[:4]:
        put(engine, job_id, model="nobody serves it")
    for job_id in jobs[4:5]:
        put(engine, job_id, reward_model="another")
    wake_ups = store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60)
    notified = {(wake_up.job_id, wake_up.model) for wake_up in wake_ups}
    assert notified == {(jobs[0], "nobody serves it"), (jobs[4], "policy"), (jobs[5], "policy")}


def test_sweep_removes_silent_workers(store: Store) -> None:
    store.workers.register("worker-1", concurrency=1, **SERVES)
    store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
    assert len(store.workers.live(60)) == 1
    store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=-1)
    assert store.workers.live(60) == []


ENDS = st.sampled_from(TERMINAL).map(Outcome)
ACTIONS = (
    st.tuples(st.just("claim"), st.sampled_from([-1.0, 60.0]))
    | st.tuples(st.just("step"), st.integers(0, 3))
    | st.tuples(st.just("release"), st.sampled_from([None, -1.0, 60.0]))
    | st.tuples(st.just("finish"), ENDS)
    | st.tuples(st.sampled_from(["cancel", "pause", "resume", "pause", "resume"]), st.none())
    | st.tuples(st.just("sweep"), st.none())
)
ALLOWED_TRANSITIONS: dict[str, set[str]] = {
    "queued": {"in_progress", "paused", "cancelled"},
    "in_progress": {"queued", "paused", "cancelling", "failed", *TERMINAL},
    "paused": {"queued", "cancelled"},
    "cancelling": {"cancelled"},
}


class JobUnderTest:
    """A job with every lease that was ever held on it; actions use the old leases too."""

    def __init__(self, store: Store, state: State) -> None:
        self.store = store
        self.job_id = create(store, state, max_attempts=3)
        self.leases: list[Lease] = []

    def apply(self, action: str, argument: Any, lease_index: int) -> None:
        """Apply an action, with the lease of this index counted from the last."""
        store = self.store
        lease = self.leases[-1 - lease_index % len(self.leases)] if self.leases else None
        try:
            match action:
                case "claim":
                    claimed = claim_one(store, self.job_id, "worker-1", argument, **SERVES)
                    self.leases += [claimed[0]] if claimed else []
                case "cancel":
                    store.jobs.cancel(self.job_id)
                case "pause":
                    store.jobs.pause(self.job_id)
                case "resume":
                    store.jobs.resume(self.job_id)
                case "sweep":
                    sweep(store)
                case "step" if lease:
                    state = store.jobs.state(self.job_id)
                    store.leases.checkpoint(lease, make_step(state))
                case "release" if lease:
                    store.leases.release(lease, delay_seconds=argument)
                case "finish" if lease:
                    store.leases.finish(lease, argument)
        except WrongStateError:
            assert store.jobs.get(self.job_id).status in ("cancelling", *TERMINAL)
        except LeaseLostError:
            job = store.jobs.get(self.job_id)
            assert lease
            assert job.fence != lease.fence or job.lease_owner is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ACTIONS, st.sampled_from([0, 0, 0, 1, 2])), max_size=25))
def test_job_invariants_hold_for_any_sequence(store: Store, actions: list[tuple[tuple[str, Any], int]]) -> None:
    job = JobUnderTest(store, new_state(sample_size=1, max_iterations=1))
    before = store.jobs.get(job.job_id)
    recorded = store.jobs.state(job.job_id)
    for (action, argument), lease_index in actions:
        job.apply(action, argument, lease_index)
        after, record = store.jobs.get(job.job_id), store.jobs.state(job.job_id)
        if after.status != before.status:
            assert before.status not in TERMINAL
            assert after.status in ALLOWED_TRANSITIONS[before.status]
        if before.status in TERMINAL:
            assert record == recorded
        assert after.fence == before.fence + (before.status == "queued" and after.status == "in_progress")
        assert len(record.calls) >= len(recorded.calls)
        assert after.consecutive_failures <= after.max_attempts
        assert (after.status in ("in_progress", "cancelling")) == (after.lease_owner is not None)
        assert (after.status in TERMINAL) == (after.completed_at is not None)
        assert after.pause_requested_at is None or after.status == "in_progress"
        ends = [t for t in event_types(store, job.job_id) if t.removeprefix("job.") in TERMINAL]
        assert ends == ([f"job.{after.status}"] if after.status in TERMINAL else [])
        before, recorded = after, record
