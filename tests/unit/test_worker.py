"""How a worker's thread ends each kind of run, in process, on SQLite."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as celery_state

from tests.jobs import claim_one, put
from tests.processes import timeless, uninterrupted
from tpo import prompts
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.errors import (
    BackendUnavailable,
    ContextTooLong,
    Interrupted,
    LeaseLost,
    QueueUnavailable,
    StoreUnavailable,
    TPOError,
)
from tpo.jobs.database import connect
from tpo.jobs.store import Claimed, Flags, Lease, Store
from tpo.jobs.tables import Job
from tpo.loop import pending
from tpo.ports import Generate, Generation, Interrupt, Rewards, Score
from tpo.queue import Doorbell
from tpo.settings import Settings
from tpo.state import Message, Params, State
from tpo.status import Status
from worker.drain import Drain
from worker.lease import Held, Leases
from worker.tasks import JobRunner, Sweeper

SECRET = "a text of a user"


class Bells(Doorbell):
    """A doorbell that remembers."""

    def __init__(self) -> None:
        self.rung: list[str] = []
        self.broken = False

    def ring(self, job_id: str, model: str) -> None:
        if self.broken:
            raise QueueUnavailable()
        self.rung.append(job_id)


class Policy(ScriptedPolicy):
    """The scripted policy, that fails when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[Generate, Interrupt], None] = lambda _request, _interrupt: None

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.before(request, interrupt)
        return super().generate(request, interrupt)


class Reward(ScriptedRewardModel):
    """The scripted reward model, that does what the test says before it scores."""

    before: Callable[[Score, Interrupt], None] = staticmethod(lambda _request, _interrupt: None)

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        self.before(request, interrupt)
        return super().score(request, interrupt)


class FlakyStore(Store):
    """A store whose database goes away for some calls."""

    fails: dict[str, int]
    watch: Callable[[State], None] = staticmethod(lambda _after: None)

    def _maybe(self, name: str) -> None:
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            raise StoreUnavailable()

    def claim_next(self, *args: Any, **kwargs: Any) -> Claimed | None:
        self._maybe("claim")
        return super().claim_next(*args, **kwargs)

    def next_waiting(self, *args: Any, **kwargs: Any) -> str | None:
        self._maybe("next")
        return super().next_waiting(*args, **kwargs)

    def checkpoint(self, lease: Lease, before: State, after: State) -> Flags:
        self._maybe("checkpoint")
        flags = super().checkpoint(lease, before, after)
        self._maybe("answer of checkpoint")
        self.watch(after)
        return flags

    def finish(self, *args: Any) -> Status:
        self._maybe("finish")
        return super().finish(*args)


@dataclass
class Bench:
    """A worker without its process."""

    store: FlakyStore
    policy: Policy
    reward: Reward
    bells: Bells
    drain: Drain
    leases: Leases
    runner: JobRunner
    settings: Settings

    def create(self, max_attempts: int = 3, deadline_seconds: float | None = None, **params: Any) -> str:
        state = State(
            input=(Message(role="user", content=SECRET),),
            params=Params.model_validate({"sample_size": 2, "max_iterations": 1, **params}),
            prompts=prompts.load("conversation"),
        )
        job = self.store.create(
            state,
            model="scripted",
            reward_model="scripted",
            max_attempts=max_attempts,
            deadline_seconds=deadline_seconds,
        )
        return job.id

    def run(self, job_id: str) -> Job:
        self.runner.run_job(job_id)
        assert self.leases.held() == []
        return self.store.get(job_id)


@pytest.fixture
def bench(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(celery_state, "should_stop", None)
    shutil.copy(sqlite_template, tmp_path / "tpo.db")
    settings = Settings(policy="scripted", reward_model="scripted", database_url=f"sqlite:///{tmp_path}/tpo.db")
    engine = connect(settings.database_url.get_secret_value())
    store, policy, reward, bells, drain = FlakyStore(engine), Policy(), Reward(), Bells(), Drain()
    store.fails = {}
    leases = Leases(store, drain, "worker", settings)
    runner = JobRunner(settings, store, bells, policy, reward, leases, drain, "worker")
    yield Bench(store, policy, reward, bells, drain, leases, runner, settings)
    engine.dispose()


def fail_on(kind: str, error: Exception) -> Callable[[Generate, Interrupt], None]:
    def before(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == kind:
            raise error

    return before


def assert_exact(bench: Bench, job: Job) -> None:
    state = bench.store.state(job.id)
    assert job.status == "completed"
    assert timeless(state) == uninterrupted(state)


def test_a_run_to_its_end(bench: Bench) -> None:
    assert_exact(bench, bench.run(bench.create()))


def test_an_error_of_the_job_fails_it_with_code_and_message(bench: Bench) -> None:
    bench.policy.before = fail_on("loss", ContextTooLong("Too long by 7 tokens."))
    job = bench.run(bench.create())
    assert (job.status, job.error_code, job.error_message) == ("failed", "context_too_long", "Too long by 7 tokens.")


def test_a_model_that_is_away_costs_an_attempt_and_a_pause_and_no_step(bench: Bench) -> None:
    bench.policy.before = fail_on("loss", BackendUnavailable())
    job = bench.run(job_id := bench.create(max_attempts=2))
    assert (job.status, job.attempt) == ("queued", 1)
    assert job.next_attempt_at is not None
    assert 0.5 < job.next_attempt_at - (job.started_at or 0) < 4
    assert len(bench.store.state(job_id).calls) == 2
    assert bench.run(job_id).attempt == 1, "not before its pause is over"


def test_a_model_that_stays_away_fails_the_job_at_its_last_attempt(bench: Bench) -> None:
    bench.policy.before = fail_on("sample", BackendUnavailable("The server does not answer."))
    job = bench.run(bench.create(max_attempts=1))
    assert (job.status, job.error_code) == ("failed", "backend_unavailable")
    assert not bench.drain.begun.is_set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendUnavailable("503"), "backend_unavailable"),
        (QueueUnavailable(), "queue_unavailable"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_what_passes_is_tried_again_and_says_why(bench: Bench, error: Exception, code: str) -> None:
    bench.policy.before = fail_on("sample", error)
    job = bench.run(bench.create(max_attempts=2))
    assert (job.status, job.attempts_in_vain) == ("queued", 1)
    assert bench.store.events(job.id)[-1].data["reason"] == code
    bench.store.retry_now(job.id)
    job = bench.run(job.id)
    assert (job.status, job.error_code) == ("failed", code)
    assert job.error_message
    assert bench.store.events(job.id)[-1].data == {"reason": code}


def test_each_failure_in_a_row_doubles_the_pause_and_a_step_starts_anew(bench: Bench) -> None:
    def pause_after(kind: str) -> float:
        bench.policy.before = fail_on(kind, BackendUnavailable())
        bench.store.retry_now(job_id)
        bench.run(job_id)
        return float(bench.store.events(job_id)[-1].data["delay_seconds"])

    job_id = bench.create(max_attempts=9)
    for longest in (2, 4, 8):
        assert longest / 2 <= pause_after("sample") <= longest
    assert pause_after("loss") <= 1
    assert 1 <= pause_after("loss") <= 2
    put(bench.store._engine, job_id, attempts_in_vain=30, max_attempts=99)
    assert pause_after("loss") <= 60


@pytest.mark.parametrize("error", [ContextTooLong("Too long."), ValueError("?")])
def test_what_does_not_pass_is_not_tried_again(bench: Bench, error: Exception) -> None:
    bench.policy.before = fail_on("sample", error)
    job = bench.run(bench.create())
    assert (job.status, job.attempt, job.next_attempt_at) == ("failed", 1, None)


def test_a_budget_ends_a_job_with_the_best_so_far(bench: Bench) -> None:
    job = bench.run(bench.create(max_output_tokens=1))
    state = bench.store.state(job.id)
    assert state.best
    assert (job.status, job.output, job.incomplete_reason) == ("incomplete", state.best.text, "max_output_tokens")
    assert (job.iteration, job.phase, job.stop_reason) == (0, None, None)
    assert bench.store.events(job.id)[-1].data == {"reason": "max_output_tokens"}


def test_a_budget_holds_over_attempts(bench: Bench) -> None:
    straight = bench.run(bench.create(max_iterations=4, max_output_tokens=150, seed=3))
    torn = bench.create(max_iterations=4, max_output_tokens=150, seed=3, max_attempts=50)
    asked = 0

    def fail_each_second_time(request: Generate, interrupt: Interrupt) -> None:
        nonlocal asked
        asked += 1
        if asked % 2:
            raise BackendUnavailable()

    bench.policy.before = fail_each_second_time
    for _ in range(50):
        if bench.run(torn).status == "incomplete":
            break
        bench.store.retry_now(torn)
    job = bench.store.get(torn)
    assert job.attempt > 3
    assert (job.status, job.output, job.output_tokens) == ("incomplete", straight.output, straight.output_tokens)
    assert timeless(bench.store.state(torn)) == timeless(bench.store.state(straight.id))


def test_a_job_that_is_given_up_has_completed_and_says_why(bench: Bench) -> None:
    job = bench.run(bench.create(max_iterations=5, early_stop={"patience": 1, "min_gain": 1000}))
    assert (job.status, job.stop_reason, job.incomplete_reason) == ("completed", "early_stop", None)
    assert job.output
    assert (job.iteration, job.phase) == (1, None)
    assert bench.store.events(job.id)[-1].data == {"reason": "early_stop"}


def test_a_broken_model_ends_the_process_for_another_to_take_its_place(bench: Bench) -> None:
    bench.policy.before = fail_on("loss", BackendUnavailable())
    bench.policy.healthy = False
    assert bench.run(bench.create()).status == "queued"
    assert bench.drain.begun.is_set()
    assert bench.drain.exit_code == 1
    assert celery_state.should_stop == 0


def test_a_model_that_ends_with_its_worker_is_not_broken(bench: Bench) -> None:
    def end(request: Generate, interrupt: Interrupt) -> None:
        bench.drain.begun.set()
        bench.policy.healthy = False
        raise BackendUnavailable("The policy was closed.")

    bench.policy.before = end
    assert bench.run(bench.create()).status == "queued"
    assert bench.drain.exit_code == 0


def test_an_unexpected_error_is_told_by_its_place_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def before(request: Generate, interrupt: Interrupt) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"cannot do {SECRET}") from error

    bench.policy.before = before
    with caplog.at_level(logging.DEBUG):
        job = bench.run(bench.create())
    assert (job.status, job.error_code) == ("failed", "internal_error")
    assert "ValueError" in caplog.text
    assert "caused by KeyError" in caplog.text
    assert __name__.rpartition(".")[2] in caplog.text
    assert SECRET not in caplog.text + (job.error_message or "")


def test_a_database_that_goes_away_costs_no_call(bench: Bench) -> None:
    asked = []
    bench.policy.before = lambda request, _interrupt: asked.append(request.kind)
    bench.store.fails = {"checkpoint": 2, "answer of checkpoint": 1, "finish": 2}
    assert_exact(bench, bench.run(bench.create()))
    assert asked == ["sample", "loss", "gradient", "update"]


def test_a_drain_does_not_wait_for_a_database_that_is_away(bench: Bench) -> None:
    bench.store.fails = {"checkpoint": 10**6}
    # Not before the run has begun: a drain that was there first would hand the job back.
    bench.policy.before = lambda _request, _interrupt: threading.Timer(0.2, bench.drain.interrupting.set).start()
    job = bench.run(bench.create())
    assert job.status == "in_progress"
    assert bench.store.state(job.id).calls == ()


def test_a_claim_without_a_database_is_left_to_the_sweeper(bench: Bench) -> None:
    bench.store.fails = {"claim": 1}
    job = bench.run(bench.create())
    assert (job.status, job.attempt) == ("queued", 0)


def test_a_lost_lease_stops_the_job_and_writes_nothing(bench: Bench) -> None:
    job_id = bench.create()

    def steal(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "gradient":
            held = bench.leases.held()[0]
            bench.store.release(held, delay_seconds=0)
            assert claim_one(bench.store, job_id, "thief", 30, model="scripted", reward_model="scripted")

    bench.policy.before = steal
    job = bench.run(job_id)
    assert (job.status, job.lease_owner, job.fence) == ("in_progress", "thief", 2)
    assert len(bench.store.state(job_id).calls) == 3


@pytest.mark.parametrize(("kind", "status", "calls"), [("sample", "expired", 1), ("loss", "incomplete", 3)])
def test_a_deadline_gives_the_best_so_far(bench: Bench, kind: str, status: str, calls: int) -> None:
    job_id = bench.create(deadline_seconds=600)

    def let_it_pass(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == kind:
            put(bench.store._engine, job_id, deadline_at=1.0)

    bench.policy.before = let_it_pass
    job = bench.run(job_id)
    state = bench.store.state(job_id)
    assert (job.status, len(state.calls)) == (status, calls)
    assert job.output == (state.best.text if state.best else None)


def test_a_cancel_between_two_calls(bench: Bench) -> None:
    job_id = bench.create()

    def cancel(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "loss":
            bench.store.cancel(job_id)

    bench.policy.before = cancel
    job = bench.run(job_id)
    assert (job.status, job.output) == ("cancelled", None)
    assert len(bench.store.state(job_id).calls) == 3


def test_a_drain_lets_the_last_call_complete_the_job(bench: Bench) -> None:
    bench.store.watch = lambda after: bench.drain.begun.set() if pending(after) is None else None
    assert_exact(bench, bench.run(bench.create()))
    assert bench.drain.begun.is_set()


def test_a_drain_hands_a_job_back_after_the_running_call(bench: Bench) -> None:
    job_id = bench.create()
    bench.policy.before = lambda request, _: bench.drain.begun.set() if request.kind == "loss" else None
    job = bench.run(job_id)
    assert (job.status, job.attempt) == ("queued", 0)
    assert bench.bells.rung == [job_id]
    assert len(bench.store.state(job_id).calls) == 3
    bench.drain.begun.clear()
    bench.policy.before = lambda request, _: None
    assert_exact(bench, bench.run(job_id))


def test_a_doorbell_that_comes_in_a_drain_is_passed_on(bench: Bench) -> None:
    bench.drain.begun.set()
    job = bench.run(bench.create())
    assert (job.status, job.fence) == ("queued", 0)
    assert bench.bells.rung == [job.id]
    bench.bells.broken = True
    assert bench.run(job.id).status == "queued"


def held_for(seconds: float, drain: Drain | None = None) -> Held:
    return Held(Lease("job_1", "worker", 1, 1, 1, 3, seconds), drain or Drain())


def test_a_lease_that_nobody_could_renew_is_taken_as_lost() -> None:
    held = held_for(0.01)
    time.sleep(0.02)
    with pytest.raises(Interrupted, match="lease_lost"):
        held.interrupt()
    held = held_for(30)
    held.told(Flags(cancel_requested=False, past_deadline=False), renewed=time.monotonic() - 31)
    held.interrupt()  # that renewal began before the job was claimed
    held.told(Flags(cancel_requested=False, past_deadline=False), renewed=time.monotonic())
    held.interrupt()


def test_a_checkpoint_renews_the_lease_from_before_it_was_written(bench: Bench) -> None:
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
    assert called["loss"] < renewed["gradient"] < written["loss"]


def test_who_cancels_comes_before_a_deadline_and_that_before_a_pause() -> None:
    held = held_for(30)
    for flags, reason in (
        (Flags(cancel_requested=True, past_deadline=True, pause_requested=True), "cancelled"),
        (Flags(cancel_requested=False, past_deadline=True, pause_requested=True), "deadline"),
    ):
        held.told(flags)
        with pytest.raises(Interrupted, match=reason):
            held.interrupt()


def test_a_lease_of_another_worker_stays_lost() -> None:
    held = held_for(30)
    held.told(None)
    with pytest.raises(Interrupted, match="lease_lost"):
        held.interrupt()


def test_a_job_that_this_worker_has_claimed_anew_is_lost_to_its_first_thread(bench: Bench) -> None:
    job_id = bench.create()

    def claim() -> Lease:
        claimed = claim_one(bench.store, job_id, "worker", 30, model="scripted", reward_model="scripted")
        assert claimed
        return claimed[0]

    first = claim()
    bench.store.release(first, delay_seconds=0)
    with bench.leases.holding(first) as old, bench.leases.holding(claim()) as new:
        bench.leases._ask(bench.leases._renew)
        with pytest.raises(Interrupted, match="lease_lost"):
            old.interrupt()
        new.interrupt()


def test_the_keeper_renews_whatever_happens_and_carries_flags_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = claim_one(bench.store, job_id := bench.create(), "worker", 30, model="scripted", reward_model="scripted")
    assert claimed
    troubles = [ValueError(SECRET), StoreUnavailable()]
    leased: list[float] = []
    renewed_often = threading.Event()
    renew = bench.store.renew

    def look_on(*args: Any) -> dict[str, tuple[int, Flags]]:
        if troubles:
            raise troubles.pop()
        owned = renew(*args)
        leased.append(bench.store.get(job_id).lease_until or 0)
        if len(leased) == 3:
            renewed_often.set()
        return owned

    monkeypatch.setattr(bench.store, "renew", look_on)
    leases = Leases(bench.store, bench.drain, "worker", bench.settings.model_copy(update={"lease_seconds": 0.3}))
    with leases.holding(claimed[0]) as held:
        leases.start()
        try:
            assert renewed_often.wait(60)
            held.interrupt()
            assert leased == sorted(set(leased))
            assert [worker.id for worker in bench.store.workers(60)] == ["worker"]
            bench.store.cancel(job_id)
            with pytest.raises(Interrupted, match="cancelled"):
                interrupted_within(held, 60)
        finally:
            leases.stop()


def test_who_waits_for_the_last_job_is_told_when_it_ends(bench: Bench) -> None:
    waiting = threading.Thread(target=bench.leases.wait_until_idle, args=(3600,), daemon=True)
    with bench.leases.holding(Lease("job_1", "worker", 1, 1, 1, 3, 30)):
        waiting.start()
        assert not bench.leases.wait_until_idle(0)
    waiting.join(60)
    assert not waiting.is_alive()


def interrupted_within(held: Held, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held.interrupt()
        time.sleep(0.01)


def test_a_lease_is_renewed_each_third_of_its_time_and_looked_at_in_between(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    monkeypatch.setattr("worker.lease.time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(leases._stopping, "wait", rest)
    monkeypatch.setattr(bench.store, "renew", asks("renew"))
    monkeypatch.setattr(bench.store, "look", asks("look"))
    with leases.holding(lease):
        leases._keep()
    assert asked == [("look" if second % 10 else "renew", second) for second in range(26)]


def test_the_sweeper_rings_once_for_any_number_of_jobs(bench: Bench) -> None:
    sweeper = Sweeper(bench.settings.model_copy(update={"ring_again_seconds": 1e-6}), bench.store, bench.bells)
    first, *_ = sorted(bench.create() for _ in range(3))
    sweeper.sweep()
    assert bench.bells.rung == [first]


def test_a_bell_is_passed_on_while_jobs_wait(bench: Bench) -> None:
    jobs = sorted(bench.create() for _ in range(3))
    for done in range(1, 4):
        bench.runner.run_job("job_of_another_bell")
        assert [bench.store.get(job_id).status for job_id in jobs] == ["completed"] * done + ["queued"] * (3 - done)
    assert bench.bells.rung == [jobs[1], jobs[1], jobs[2], jobs[2]]
    bench.runner.run_job(jobs[0])
    assert bench.bells.rung == [jobs[1], jobs[1], jobs[2], jobs[2]], "a bell for nothing ends there"


def test_a_bell_that_cannot_be_passed_on_disturbs_no_job(bench: Bench) -> None:
    first, second = sorted(bench.create() for _ in range(2))
    bench.store.fails = {"next": 1}
    assert_exact(bench, bench.run(first))
    bench.bells.broken = True
    bench.create()
    assert_exact(bench, bench.run(second))


@pytest.mark.parametrize("error", [StoreUnavailable(), QueueUnavailable(), LeaseLost(), ValueError(SECRET)])
def test_a_sweep_that_fails_says_so_and_leaves_it_to_the_next(
    bench: Bench, error: TPOError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sweep(**_kwargs: float) -> None:
        raise error

    monkeypatch.setattr(bench.store, "sweep", sweep)
    Sweeper(bench.settings, bench.store, bench.bells).sweep()
    assert caplog.records
    assert SECRET not in caplog.text


def test_a_paused_queue_ends_a_run_after_its_step_and_not_within_it(bench: Bench) -> None:
    job_id = bench.create()

    def pause(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "loss":
            bench.store.pause_queue("scripted")
            with bench.leases._lock:
                (held,) = bench.leases._held
            held.told(bench.store.look("worker", [job_id])[job_id][1])
            interrupt()

    bench.policy.before = pause
    job = bench.run(job_id)
    assert (job.status, job.attempt, len(bench.store.state(job_id).calls)) == ("queued", 0, 3)
    assert bench.run(job_id).fence == job.fence
    assert bench.bells.rung == []
    bench.policy.before = lambda _request, _interrupt: None
    bench.store.resume_queue("scripted")
    assert_exact(bench, bench.run(job_id))


@pytest.mark.parametrize(("kind", "calls"), [("score", 1), ("loss", 2)])
def test_a_pause_stops_a_running_call_and_costs_no_attempt(bench: Bench, kind: str, calls: int) -> None:
    job_id = bench.create()

    def pause(request: Generate | Score, interrupt: Interrupt) -> None:
        if (request.kind if isinstance(request, Generate) else "score") == kind:
            bench.store.pause(job_id)
            with bench.leases._lock:
                (held,) = bench.leases._held
            held.told(Flags(cancel_requested=False, past_deadline=False, pause_requested=True))
            interrupt()
            raise AssertionError("the call goes on")

    bench.policy.before = bench.reward.before = pause
    bench.runner.run_job(job_id)
    job = bench.store.get(job_id)
    assert (job.status, job.attempt, len(bench.store.state(job_id).calls)) == ("paused", 0, calls)
    assert bench.bells.rung == []
    bench.policy.before = lambda _request, _interrupt: None
    bench.reward.before = lambda _request, _interrupt: None
    bench.store.resume(job_id)
    bench.runner.run_job(job_id)
    assert_exact(bench, bench.store.get(job_id))
