"""A worker thread handles each outcome of a run, in process, on SQLite."""

import logging
import time
from collections.abc import Callable

import pytest
from celery.worker import state as celery_state

from testing.jobs import claim_one, put
from testing.processes import timeless, uninterrupted
from tests.support.worker_harness import SECRET, Bench
from tpo.core.errors import (
    BackendUnavailableError,
    BrokerUnavailableError,
    ContextTooLongError,
    LeaseLostError,
    StoreUnavailableError,
    TPOError,
)
from tpo.core.loop import pending
from tpo.core.ports import Generate, Interrupt, Score
from tpo.jobs.leases import Flags
from tpo.jobs.view import JobView
from worker.tasks.rescuer import Rescuer


def fail_on(kind: str, error: Exception) -> Callable[[Generate, Interrupt], None]:
    """Return a hook that raises the error in calls of this kind."""

    def before(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == kind:
            raise error

    return before


def assert_exact(bench: Bench, job: JobView) -> None:
    """Assert that a job completed with the record of an uninterrupted run."""
    state = bench.store.jobs.state(job.id)
    assert job.status == "completed"
    assert timeless(state) == uninterrupted(state)


def test_job_runs_to_completion(bench: Bench) -> None:
    assert_exact(bench, bench.run(bench.create()))


def test_job_error_fails_job_with_code_and_message(bench: Bench) -> None:
    bench.policy.before = fail_on("critique", ContextTooLongError("Too long by 7 tokens."))
    job = bench.run(bench.create())
    assert (job.status, job.error_code, job.error_message) == ("failed", "context_too_long", "Too long by 7 tokens.")


def test_unavailable_model_costs_attempt_but_no_step(bench: Bench) -> None:
    bench.policy.before = fail_on("critique", BackendUnavailableError())
    job = bench.run(job_id := bench.create(max_attempts=2))
    assert (job.status, job.attempt) == ("queued", 1)
    assert job.next_attempt_at is not None
    assert job.next_attempt_at - (job.started_at or 0) > 0.5
    assert bench.store.jobs.events(job_id)[-1].data["delay_seconds"] <= 1
    assert len(bench.store.jobs.state(job_id).calls) == 2
    assert bench.run(job_id).attempt == 1, "it is not claimed before its back-off ends"


def test_unavailable_model_fails_job_on_last_attempt(bench: Bench) -> None:
    bench.policy.before = fail_on("sample", BackendUnavailableError("The server does not answer."))
    job = bench.run(bench.create(max_attempts=1))
    assert (job.status, job.error_code) == ("failed", "backend_unavailable")
    assert not bench.drain.begun.is_set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendUnavailableError("503"), "backend_unavailable"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_transient_error_is_retried_with_reason(bench: Bench, error: Exception, code: str) -> None:
    bench.policy.before = fail_on("sample", error)
    job = bench.run(bench.create(max_attempts=2))
    assert (job.status, job.consecutive_failures) == ("queued", 1)
    assert bench.store.jobs.events(job.id)[-1].data["reason"] == code
    bench.store.jobs.retry_now(job.id)
    job = bench.run(job.id)
    assert (job.status, job.error_code) == ("failed", code)
    assert job.error_message
    assert bench.store.jobs.events(job.id)[-1].data == {"reason": code}


def test_back_off_doubles_per_failure_and_resets_after_step(bench: Bench) -> None:
    def pause_after(kind: str) -> float:
        bench.policy.before = fail_on(kind, BackendUnavailableError())
        bench.store.jobs.retry_now(job_id)
        bench.run(job_id)
        return float(bench.store.jobs.events(job_id)[-1].data["delay_seconds"])

    job_id = bench.create(max_attempts=9)
    for limit in (2, 4, 8):
        assert limit / 2 <= pause_after("sample") <= limit
    assert pause_after("critique") <= 1
    assert 1 <= pause_after("critique") <= 2
    put(bench.store.engine, job_id, consecutive_failures=30, max_attempts=99)
    assert pause_after("critique") <= 60


@pytest.mark.parametrize("error", [ContextTooLongError("Too long."), ValueError("?")])
def test_permanent_error_is_not_retried(bench: Bench, error: Exception) -> None:
    bench.policy.before = fail_on("sample", error)
    job = bench.run(bench.create())
    assert (job.status, job.attempt, job.next_attempt_at) == ("failed", 1, None)


def test_budget_ends_job_with_best_candidate(bench: Bench) -> None:
    job = bench.run(bench.create(max_output_tokens=1))
    state = bench.store.jobs.state(job.id)
    assert state.best
    assert (job.status, job.output, job.incomplete_reason) == ("incomplete", state.best.text, "max_output_tokens")
    assert (job.iteration, job.phase, job.stop_reason) == (0, None, None)
    assert bench.store.jobs.events(job.id)[-1].data == {"reason": "max_output_tokens"}


def test_budget_holds_across_attempts(bench: Bench) -> None:
    straight = bench.run(bench.create(max_iterations=4, max_output_tokens=150, seed=3))
    interrupted = bench.create(max_iterations=4, max_output_tokens=150, seed=3, max_attempts=50)
    calls = 0

    def fail_each_second_time(request: Generate, interrupt: Interrupt) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise BackendUnavailableError()

    bench.policy.before = fail_each_second_time
    for _ in range(50):
        if bench.run(interrupted).status == "incomplete":
            break
        bench.store.jobs.retry_now(interrupted)
    job = bench.store.jobs.get(interrupted)
    assert job.attempt > 3
    assert (job.status, job.output, job.output_tokens) == ("incomplete", straight.output, straight.output_tokens)
    assert timeless(bench.store.jobs.state(interrupted)) == timeless(bench.store.jobs.state(straight.id))


def test_early_stopped_job_completes_with_reason(bench: Bench) -> None:
    job = bench.run(bench.create(max_iterations=5, early_stop={"patience": 1, "min_gain": 1000}))
    assert (job.status, job.stop_reason, job.incomplete_reason) == ("completed", "early_stop", None)
    assert job.output
    assert (job.iteration, job.phase) == (1, None)
    assert bench.store.jobs.events(job.id)[-1].data == {"reason": "early_stop"}


def test_unhealthy_model_ends_worker(bench: Bench) -> None:
    bench.policy.before = fail_on("critique", BackendUnavailableError())
    bench.policy.healthy = False
    job = bench.run(bench.create())
    assert bench.drain.begun.is_set()
    assert bench.drain.exit_code == 1
    assert job.status == "in_progress", "the rescuer decides whether its attempt counts"
    bench.store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
    assert bench.store.jobs.get(job.id).status == "queued"
    assert celery_state.should_stop == 0


def test_model_closed_by_drain_is_not_an_error(bench: Bench) -> None:
    def end(request: Generate, interrupt: Interrupt) -> None:
        bench.drain.begun.set()
        bench.policy.healthy = False
        raise BackendUnavailableError("The policy was closed.")

    bench.policy.before = end
    assert bench.run(bench.create()).status == "queued"
    assert bench.drain.exit_code == 0


def test_unexpected_error_is_logged_without_texts(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
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


def test_database_outage_repeats_no_call(bench: Bench) -> None:
    calls = []
    bench.policy.before = lambda request, _interrupt: calls.append(request.kind)
    bench.store.fails = {"checkpoint": 2, "acknowledgement of checkpoint": 1, "finish": 2}
    assert_exact(bench, bench.run(bench.create()))
    assert calls == ["sample", "critique", "gradient", "update"]


def test_drain_does_not_wait_for_unavailable_database(bench: Bench) -> None:
    # The drain starts after the call: one that started earlier would release the job.
    bench.store.fails = {"checkpoint": 10**6, "release": 10**6}
    bench.store.on_failure = bench.drain.interrupting.set
    job = bench.run(bench.create())
    assert job.status == "in_progress"
    assert bench.store.jobs.state(job.id).calls == ()


def test_failed_claim_leaves_job_queued(bench: Bench) -> None:
    bench.store.fails = {"claim": 1}
    job = bench.run(bench.create())
    assert (job.status, job.attempt) == ("queued", 0)


def test_lost_lease_stops_job_without_writing(bench: Bench) -> None:
    job_id = bench.create()

    def steal(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "gradient":
            held = bench.leases.held()[0]
            bench.store.leases.release(held, delay_seconds=0)
            assert claim_one(bench.store, job_id, "thief", 30, model="scripted", reward_model="scripted")

    bench.policy.before = steal
    job = bench.run(job_id)
    assert (job.status, job.lease_owner, job.fence) == ("in_progress", "thief", 2)
    assert len(bench.store.jobs.state(job_id).calls) == 3


@pytest.mark.parametrize(("kind", "status", "calls"), [("sample", "expired", 1), ("critique", "incomplete", 3)])
def test_deadline_ends_job_with_best_candidate(bench: Bench, kind: str, status: str, calls: int) -> None:
    job_id = bench.create(deadline_seconds=600)

    def pass_deadline(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == kind:
            put(bench.store.engine, job_id, deadline_at=1.0)

    bench.policy.before = pass_deadline
    job = bench.run(job_id)
    state = bench.store.jobs.state(job_id)
    assert (job.status, len(state.calls)) == (status, calls)
    assert job.output == (state.best.text if state.best else None)


def test_cancel_takes_effect_between_calls(bench: Bench) -> None:
    job_id = bench.create()

    def cancel(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "critique":
            bench.store.jobs.cancel(job_id)

    bench.policy.before = cancel
    job = bench.run(job_id)
    assert (job.status, job.output) == ("cancelled", None)
    assert len(bench.store.jobs.state(job_id).calls) == 3


def test_drain_lets_last_call_complete_job(bench: Bench) -> None:
    bench.store.watch = lambda after: bench.drain.begun.set() if pending(after) is None else None
    assert_exact(bench, bench.run(bench.create()))
    assert bench.drain.begun.is_set()


def test_drain_releases_job_after_running_call(bench: Bench) -> None:
    job_id = bench.create()
    bench.policy.before = lambda request, _: bench.drain.begun.set() if request.kind == "critique" else None
    job = bench.run(job_id)
    assert (job.status, job.attempt) == ("queued", 0)
    assert bench.notifier.notified == [job_id]
    assert len(bench.store.jobs.state(job_id).calls) == 3
    bench.drain.begun.clear()
    bench.policy.before = lambda request, _: None
    assert_exact(bench, bench.run(job_id))


def test_wake_up_during_drain_is_passed_on(bench: Bench) -> None:
    bench.drain.begun.set()
    job = bench.run(bench.create())
    assert (job.status, job.fence) == ("queued", 0)
    assert bench.notifier.notified == [job.id]
    bench.notifier.broken = True
    assert bench.run(job.id).status == "queued"


def test_rescuer_notifies_once_for_many_jobs(bench: Bench) -> None:
    sweeper = Rescuer(bench.settings.model_copy(update={"renotify_seconds": 1e-6}), bench.store, bench.notifier)
    first, *_ = sorted(bench.create() for _ in range(3))
    sweeper.sweep()
    assert bench.notifier.notified == [first]


def test_wake_up_is_passed_on_while_jobs_wait(bench: Bench) -> None:
    jobs = sorted(bench.create() for _ in range(3))
    for done in range(1, 4):
        bench.runner.run_job("job_of_another_wake_up")
        assert [bench.store.jobs.get(job_id).status for job_id in jobs] == ["completed"] * done + ["queued"] * (
            3 - done
        )
    assert bench.notifier.notified == [jobs[1], jobs[1], jobs[2], jobs[2]]
    bench.runner.run_job(jobs[0])
    assert bench.notifier.notified == [jobs[1], jobs[1], jobs[2], jobs[2]], "a wake-up without a job is not passed on"


def test_failed_wake_up_does_not_disturb_job(bench: Bench) -> None:
    first, second = sorted(bench.create() for _ in range(2))
    bench.store.fails = {"next": 1}
    assert_exact(bench, bench.run(first))
    bench.notifier.broken = True
    bench.create()
    assert_exact(bench, bench.run(second))


@pytest.mark.parametrize(
    "error", [StoreUnavailableError(), BrokerUnavailableError(), LeaseLostError(), ValueError(SECRET)]
)
def test_rescuer_logs_failed_sweep_without_raising(
    bench: Bench, error: TPOError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sweep(**_kwargs: float) -> None:
        raise error

    monkeypatch.setattr(bench.store.maintenance, "sweep", sweep)
    Rescuer(bench.settings, bench.store, bench.notifier).sweep()
    assert caplog.records
    assert SECRET not in caplog.text


def test_paused_queue_stops_run_between_steps(bench: Bench) -> None:
    job_id = bench.create()

    def pause(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "critique":
            bench.store.queues.pause("scripted")
            with bench.leases._lock:
                (held,) = bench.leases._held
            held.update(bench.store.leases.check("worker", [job_id])[job_id][1], time.monotonic())
            interrupt()

    bench.policy.before = pause
    job = bench.run(job_id)
    assert (job.status, job.attempt, len(bench.store.jobs.state(job_id).calls)) == ("queued", 0, 3)
    assert bench.run(job_id).fence == job.fence
    assert bench.notifier.notified == []
    bench.policy.before = lambda _request, _interrupt: None
    bench.store.queues.resume("scripted")
    assert_exact(bench, bench.run(job_id))


@pytest.mark.parametrize(("kind", "calls"), [("score", 1), ("critique", 2)])
def test_pause_interrupts_call_and_costs_no_attempt(bench: Bench, kind: str, calls: int) -> None:
    job_id = bench.create()

    def pause(request: Generate | Score, interrupt: Interrupt) -> None:
        if (request.kind if isinstance(request, Generate) else "score") == kind:
            bench.store.jobs.pause(job_id)
            with bench.leases._lock:
                (held,) = bench.leases._held
            held.update(Flags(cancel_requested=False, past_deadline=False, pause_requested=True), time.monotonic())
            interrupt()
            raise AssertionError("the call was not interrupted")

    bench.policy.before = bench.reward.before = pause
    bench.runner.run_job(job_id)
    job = bench.store.jobs.get(job_id)
    assert (job.status, job.attempt, len(bench.store.jobs.state(job_id).calls)) == ("paused", 0, calls)
    assert bench.notifier.notified == []
    bench.policy.before = lambda _request, _interrupt: None
    bench.reward.before = lambda _request, _interrupt: None
    bench.store.jobs.resume(job_id)
    bench.runner.run_job(job_id)
    assert_exact(bench, bench.store.jobs.get(job_id))
