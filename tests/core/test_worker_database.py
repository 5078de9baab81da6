"""No error of the database, of its driver or of the broker ends a job: every kind, in every store call of a run."""

import logging
import sqlite3
from collections.abc import Callable
from typing import Any

import kombu.exceptions
import psycopg
import pytest
import redis.exceptions
from sqlalchemy import exc

from testing.processes import timeless, uninterrupted
from tests.support.worker_harness import SECRET, Bench
from tpo.core.errors import BrokerUnavailableError, StoreUnavailableError
from tpo.core.ports import Generate, Interrupt
from tpo.db.failures import translate_errors
from worker import job_runner

DBAPI = [
    exc.InterfaceError,
    exc.OperationalError,
    exc.ProgrammingError,
    exc.InternalError,
    exc.DataError,
    exc.NotSupportedError,
    exc.IntegrityError,
    exc.DatabaseError,
]
DATABASE_ERRORS: list[Exception] = [
    *(kind(f"INSERT {SECRET}", {}, Exception(SECRET)) for kind in DBAPI),
    exc.TimeoutError("QueuePool limit"),
    exc.DisconnectionError("gone"),
    exc.ResourceClosedError("This Connection is closed"),
    exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back"),
    psycopg.errors.InvalidSqlStatementName("prepared statement does not exist"),
    psycopg.OperationalError("the connection is closed"),
    sqlite3.DatabaseError("malformed"),
    StoreUnavailableError(),
]
BROKER_ERRORS: list[Exception] = [
    redis.exceptions.ConnectionError("gone"),
    redis.exceptions.TimeoutError("silent"),
    redis.exceptions.ResponseError("OOM"),
    kombu.exceptions.OperationalError("gone"),
    kombu.exceptions.LimitExceeded("full"),
    BrokerUnavailableError(),
]
STORE_CALLS = [
    ("leases", "claim"),
    ("leases", "checkpoint"),
    ("leases", "finish"),
    ("leases", "release"),
    ("queues", "next_waiting"),
]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "backoff_seconds", lambda *_args, **_options: 0.001)


def break_call(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, part: str, name: str, error: Exception, times: int, *, after: bool
) -> list[str]:
    """Let the next calls of a store's method fail, before or after their commit. Returns the list of failures."""
    queries = getattr(bench.store, part)
    call: Callable[..., Any] = getattr(queries, name)
    failed: list[str] = []

    def failing(*args: Any, **options: Any) -> Any:
        with translate_errors():  # as in the store, whose sessions translate what the driver raises
            if len(failed) < times:
                failed.append(name)
                if after:
                    call(*args, **options)
                raise error
        return call(*args, **options)

    monkeypatch.setattr(queries, name, failing)
    return failed


def assert_completes(bench: Bench, job_id: str, attempts: int = 1) -> None:
    """Run wake-ups until the job ends, and assert the record of an uninterrupted run."""
    for _ in range(4):
        if (job := bench.run(job_id)).completed_at is not None:
            break
    state = bench.store.jobs.state(job_id)
    assert (job.status, job.attempt) == ("completed", attempts)
    assert timeless(state) == uninterrupted(state)


@pytest.mark.parametrize("call", STORE_CALLS, ids=lambda call: call[1])
@pytest.mark.parametrize("error", DATABASE_ERRORS, ids=lambda error: type(error).__name__)
def test_database_error_before_commit_ends_no_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, call: tuple[str, str]
) -> None:
    failed = break_call(monkeypatch, bench, *call, error, 3, after=False)
    job_id = bench.create(max_attempts=1)
    if call[1] == "release":  # a pause is what makes a run release its job
        pause_once(bench, job_id)
    elif call[1] == "claim":
        for _ in range(3):
            assert (bench.run(job_id).status, bench.store.jobs.get(job_id).attempt) == ("queued", 0)
    assert_completes(bench, job_id)
    assert failed


@pytest.mark.parametrize("name", ["checkpoint", "finish", "release"])
@pytest.mark.parametrize("error", DATABASE_ERRORS, ids=lambda error: type(error).__name__)
def test_database_error_after_commit_ends_no_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str
) -> None:
    failed = break_call(monkeypatch, bench, "leases", name, error, 1, after=True)
    job_id = bench.create(max_attempts=1)
    if name == "release":
        pause_once(bench, job_id)
    assert_completes(bench, job_id)
    assert failed == [name]


@pytest.mark.parametrize("error", [*DATABASE_ERRORS, *BROKER_ERRORS], ids=lambda error: type(error).__name__)
def test_error_inside_a_run_hands_the_job_back(bench: Bench, error: Exception) -> None:
    job_id = bench.create(max_attempts=1)
    failures = [error] * 3

    def fail(request: Generate, interrupt: Interrupt) -> None:
        if request.kind == "critique" and failures:
            raise failures.pop()

    bench.policy.before = fail
    for _ in range(3):
        assert (bench.run(job_id).status, bench.store.jobs.get(job_id).attempt) == ("queued", 0)
    assert_completes(bench, job_id)


@pytest.mark.parametrize("error", BROKER_ERRORS, ids=lambda error: type(error).__name__)
def test_broker_error_while_notifying_ends_no_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_job_id: str, _model: str) -> None:
        raise error

    monkeypatch.setattr(bench.notifier, "notify_job", fail)
    first, second = sorted(bench.create(max_attempts=1) for _ in range(2))
    assert_completes(bench, first)
    assert_completes(bench, second)


def test_refused_statement_backs_off_and_is_logged_without_texts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[tuple[int, float]] = []

    def record(attempt: int, *, longest: float, **_options: float) -> float:
        pauses.append((attempt, longest))
        return 0.001

    monkeypatch.setattr(job_runner, "backoff_seconds", record)
    error = exc.DataError(f"INSERT {SECRET}", {}, Exception(SECRET))
    break_call(monkeypatch, bench, "leases", "checkpoint", error, 3, after=False)
    with caplog.at_level(logging.DEBUG):
        assert_completes(bench, bench.create())
    assert pauses == [(attempt, job_runner._LONGEST_PAUSE_AFTER_REFUSAL) for attempt in range(3)]
    assert "DataError" in caplog.text
    assert SECRET not in caplog.text


def pause_once(bench: Bench, job_id: str) -> None:
    """Let the first model call of the job be interrupted as a pause of its queue would."""
    interrupted: list[str] = []

    def interrupt_once(request: Generate, _interrupt: Interrupt) -> None:
        if not interrupted:
            interrupted.append(job_id)
            raise StoreUnavailableError()

    bench.policy.before = interrupt_once
    assert (bench.run(job_id).status, bench.store.jobs.get(job_id).attempt) == ("queued", 0)
