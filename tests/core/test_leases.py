"""A worker renews, checks and loses leases, in process, on SQLite."""

import dataclasses
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from testing.jobs import claim_one, put
from testing.waiting import HANG_SECONDS
from tests.support.worker_harness import SECRET, Bench
from tpo.core.errors import CallInterruptedError, StoreUnavailableError
from tpo.core.ports import Generate, Interrupt
from tpo.jobs.leases import Flags, Lease
from worker.drain import Drain
from worker.leases import HeldJob, Leases

CONTINUE = Flags(cancel_requested=False, past_deadline=False)
PAUSE = Flags(cancel_requested=False, past_deadline=False, pause_requested=True)


def held_for(seconds: float, drain: Drain | None = None) -> HeldJob:
    """Return a held lease of this duration."""
    return HeldJob(Lease("job_1", "worker", 1, 1, 1, 3, seconds), drain or Drain())


def test_unrenewed_lease_is_treated_as_lost() -> None:
    held = held_for(0.01)
    time.sleep(0.02)
    with pytest.raises(CallInterruptedError, match="lease_lost"):
        held.interrupt()
    held = held_for(30)
    held.update(CONTINUE, time.monotonic() - 31, renewed=True)
    held.interrupt()  # ignored: that renewal began before the job was claimed
    held.update(CONTINUE, time.monotonic(), renewed=True)
    held.interrupt()


def test_attempt_lost_to_the_database_does_not_count(bench: Bench) -> None:
    job_id = bench.create(max_attempts=1)
    cut = True

    def lose_lease(request: Generate, interrupt: Interrupt) -> None:
        if cut and request.kind == "critique":
            bench.leases.mark_cut_off()  # as after a renewal that could not reach the database
            with bench.leases._lock:
                (held,) = bench.leases._held
            held._renewed -= held.lease.seconds
            put(bench.store.engine, job_id, lease_until=1.0)
            interrupt()

    bench.policy.before = lose_lease
    for _ in range(3):
        bench.run(job_id)
        bench.leases._forgive()
        bench.store.maintenance.sweep(renotify_seconds=1, worker_retention_seconds=60)
        job = bench.store.jobs.get(job_id)
        assert (job.status, job.attempt, job.consecutive_failures) == ("queued", 0, 0)
    cut = False
    assert (bench.run(job_id).status, bench.store.jobs.get(job_id).attempt) == ("completed", 1)


def test_attempt_lost_for_another_reason_counts(bench: Bench) -> None:
    job_id = bench.create()

    def lose_lease(request: Generate, interrupt: Interrupt) -> None:
        with bench.leases._lock:
            (held,) = bench.leases._held
        held._renewed -= held.lease.seconds
        interrupt()

    bench.policy.before = lose_lease
    bench.run(job_id)
    bench.leases._forgive()
    put(bench.store.engine, job_id, lease_until=1.0)
    bench.store.maintenance.sweep(renotify_seconds=1, worker_retention_seconds=60)
    assert (bench.store.jobs.get(job_id).attempt, bench.store.jobs.get(job_id).consecutive_failures) == (1, 1)


def test_checkpoint_renews_lease_from_before_write(bench: Bench) -> None:
    called: dict[str, float] = {}
    renewed: dict[str, float] = {}
    written: dict[str, float] = {}

    def record_renewal(request: Generate, _interrupt: Interrupt) -> None:
        with bench.leases._lock:
            (held,) = bench.leases._held
        renewed[request.kind] = held._renewed
        called[request.kind] = time.monotonic()

    bench.policy.before = record_renewal
    bench.store.watch = lambda after: written.update({after.calls[-1].kind: time.monotonic()})
    bench.run(bench.create())
    assert called["critique"] < renewed["gradient"] < written["critique"]


def test_cancel_precedes_deadline_precedes_pause() -> None:
    held = held_for(30)
    for flags, reason in (
        (Flags(cancel_requested=True, past_deadline=True, pause_requested=True), "cancelled"),
        (Flags(cancel_requested=False, past_deadline=True, pause_requested=True), "deadline"),
    ):
        held.update(flags, time.monotonic())
        with pytest.raises(CallInterruptedError, match=reason):
            held.interrupt()


def test_older_query_result_does_not_revoke_pause() -> None:
    held = held_for(30)
    asked_before_pause = time.monotonic()
    held.update(PAUSE, time.monotonic())
    held.update(CONTINUE, asked_before_pause)
    with pytest.raises(CallInterruptedError, match="paused"):
        held.interrupt()
    held.update(CONTINUE, time.monotonic())  # a later query: the pause was withdrawn
    held.interrupt()


def test_older_query_result_does_not_revoke_queue_pause() -> None:
    held = held_for(30)
    asked_before_pause = time.monotonic()
    held.update(dataclasses.replace(CONTINUE, queue_paused=True), time.monotonic())
    held.update(CONTINUE, asked_before_pause)
    with pytest.raises(CallInterruptedError, match="queue_paused"):
        held.between_calls()
    held.update(CONTINUE, time.monotonic())
    held.between_calls()


def test_lost_lease_stays_lost() -> None:
    held = held_for(30)
    held.update(None, time.monotonic())
    held.update(CONTINUE, time.monotonic())
    with pytest.raises(CallInterruptedError, match="lease_lost"):
        held.interrupt()


def test_job_reclaimed_by_same_worker_is_lost_to_first_thread(bench: Bench) -> None:
    job_id = bench.create()

    def claim() -> Lease:
        claimed = claim_one(bench.store, job_id, "worker", 30, model="scripted", reward_model="scripted")
        assert claimed
        return claimed[0]

    first = claim()
    bench.store.leases.release(first, delay_seconds=0)
    with bench.leases.holding(first) as old, bench.leases.holding(claim()) as new:
        bench.leases._ask(bench.leases._renew)
        with pytest.raises(CallInterruptedError, match="lease_lost"):
            old.interrupt()
        new.interrupt()


def test_keeper_survives_errors_and_applies_flags(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = claim_one(bench.store, job_id := bench.create(), "worker", 30, model="scripted", reward_model="scripted")
    assert claimed
    errors = [ValueError(SECRET), StoreUnavailableError()]
    expiries: list[float] = []
    renewed_thrice = threading.Event()
    renew = bench.store.leases.renew

    def renew_after_errors(*args: Any) -> dict[str, tuple[int, Flags]]:
        if errors:
            raise errors.pop()
        owned = renew(*args)
        expiries.append(bench.store.jobs.get(job_id).lease_until or 0)
        if len(expiries) == 3:
            renewed_thrice.set()
        return owned

    monkeypatch.setattr(bench.store.leases, "renew", renew_after_errors)
    leases = Leases(bench.store, bench.drain, "worker", bench.settings.model_copy(update={"lease_seconds": 0.3}))
    with leases.holding(claimed[0]) as held:
        leases.start()
        try:
            assert renewed_thrice.wait(HANG_SECONDS)
            held.interrupt()
            seen = list(expiries)
            assert seen == sorted(set(seen))
            assert [worker.id for worker in bench.store.workers.live(60)] == ["worker"]
            bench.store.jobs.cancel(job_id)
            with pytest.raises(CallInterruptedError, match="cancelled"):
                interrupted_within(held, 60)
        finally:
            leases.stop()


def test_wait_until_idle_returns_after_last_job(bench: Bench) -> None:
    waiting = threading.Thread(target=bench.leases.wait_until_idle, args=(3600,), daemon=True)
    with bench.leases.holding(Lease("job_1", "worker", 1, 1, 1, 3, 30)):
        waiting.start()
        assert not bench.leases.wait_until_idle(0)
    waiting.join(HANG_SECONDS)
    assert not waiting.is_alive()


def interrupted_within(held: HeldJob, seconds: float) -> None:
    """Wait until the lease raises its interrupt, at most these seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held.interrupt()
        time.sleep(0.01)


def test_lease_is_renewed_each_third_and_checked_in_between(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease("job_1", "worker", 1, 1, 1, 3, 30)
    owned = {lease.job_id: (lease.fence, Flags(cancel_requested=False, past_deadline=False))}
    clock = 0.0
    queries: list[tuple[str, float]] = []
    leases = Leases(bench.store, bench.drain, "worker", bench.settings.model_copy(update={"lease_seconds": 30}))

    def recorder(query: str) -> Any:
        def record(*_: Any) -> dict[str, tuple[int, Flags]]:
            queries.append((query, clock))
            return owned

        return record

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        if clock > 25:
            leases.stop()

    monkeypatch.setattr("worker.leases.time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(leases._stopping, "wait", sleep)
    monkeypatch.setattr(bench.store.leases, "renew", recorder("renew"))
    monkeypatch.setattr(bench.store.leases, "check", recorder("check"))
    with leases.holding(lease):
        leases._keep()
    assert queries == [("check" if second % 10 else "renew", second) for second in range(26)]
