"""How leases are renewed, lost and looked at, in process, on SQLite."""

import dataclasses
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from testing.jobs import claim_one
from testing.waiting import HANG_SECONDS
from tests.support.worker_harness import SECRET, Bench
from tpo.core.errors import CallInterruptedError, StoreUnavailableError
from tpo.core.ports import Generate, Interrupt
from tpo.jobs.leases import Flags, Lease
from worker.drain import Drain
from worker.leases import Held, Leases

GO_ON = Flags(cancel_requested=False, past_deadline=False)
PAUSE = Flags(cancel_requested=False, past_deadline=False, pause_requested=True)


def held_for(seconds: float, drain: Drain | None = None) -> Held:
    return Held(Lease("job_1", "worker", 1, 1, 1, 3, seconds), drain or Drain())


def test_unrenewed_lease_is_treated_as_lost() -> None:
    held = held_for(0.01)
    time.sleep(0.02)
    with pytest.raises(CallInterruptedError, match="lease_lost"):
        held.interrupt()
    held = held_for(30)
    held.update(GO_ON, time.monotonic() - 31, renewed=True)
    held.interrupt()  # that renewal began before the job was claimed
    held.update(GO_ON, time.monotonic(), renewed=True)
    held.interrupt()


def test_checkpoint_renews_lease_from_before_write(bench: Bench) -> None:
    called: dict[str, float] = {}
    renewed: dict[str, float] = {}
    written: dict[str, float] = {}

    def look(request: Generate, _interrupt: Interrupt) -> None:
        with bench.leases._lock:
            (held,) = bench.leases._held
        renewed[request.kind] = held._renewed
        called[request.kind] = time.monotonic()

    bench.policy.before = look
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
    held.update(GO_ON, asked_before_pause)
    with pytest.raises(CallInterruptedError, match="paused"):
        held.interrupt()
    held.update(GO_ON, time.monotonic())  # a query that began later: the pause was taken back
    held.interrupt()


def test_older_query_result_does_not_revoke_queue_pause() -> None:
    held = held_for(30)
    asked_before_pause = time.monotonic()
    held.update(dataclasses.replace(GO_ON, queue_paused=True), time.monotonic())
    held.update(GO_ON, asked_before_pause)
    with pytest.raises(CallInterruptedError, match="queue_paused"):
        held.between_calls()
    held.update(GO_ON, time.monotonic())
    held.between_calls()


def test_lost_lease_stays_lost() -> None:
    held = held_for(30)
    held.update(None, time.monotonic())
    held.update(GO_ON, time.monotonic())
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
    troubles = [ValueError(SECRET), StoreUnavailableError()]
    leased: list[float] = []
    renewed_often = threading.Event()
    renew = bench.store.leases.renew

    def look_on(*args: Any) -> dict[str, tuple[int, Flags]]:
        if troubles:
            raise troubles.pop()
        owned = renew(*args)
        leased.append(bench.store.jobs.get(job_id).lease_until or 0)
        if len(leased) == 3:
            renewed_often.set()
        return owned

    monkeypatch.setattr(bench.store.leases, "renew", look_on)
    leases = Leases(bench.store, bench.drain, "worker", bench.settings.model_copy(update={"lease_seconds": 0.3}))
    with leases.holding(claimed[0]) as held:
        leases.start()
        try:
            assert renewed_often.wait(HANG_SECONDS)
            held.interrupt()
            seen = list(leased)
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


def interrupted_within(held: Held, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held.interrupt()
        time.sleep(0.01)


def test_lease_is_renewed_each_third_and_checked_in_between(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease("job_1", "worker", 1, 1, 1, 3, 30)
    owned = {lease.job_id: (lease.fence, Flags(cancel_requested=False, past_deadline=False))}
    clock = 0.0
    asked: list[tuple[str, float]] = []
    leases = Leases(bench.store, bench.drain, "worker", bench.settings.model_copy(update={"lease_seconds": 30}))

    def asks(what: str) -> Any:
        def answer(*_: Any) -> dict[str, tuple[int, Flags]]:
            asked.append((what, clock))
            return owned

        return answer

    def rest(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        if clock > 25:
            leases.stop()

    monkeypatch.setattr("worker.leases.time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(leases._stopping, "wait", rest)
    monkeypatch.setattr(bench.store.leases, "renew", asks("renew"))
    monkeypatch.setattr(bench.store.leases, "check", asks("check"))
    with leases.holding(lease):
        leases._keep()
    assert asked == [("check" if second % 10 else "renew", second) for second in range(26)]
