"""Maintenance: rescue lost jobs, end late ones, find waiting jobs to notify workers of, and delete old rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy import Select, and_, delete, literal_column, select
from sqlalchemy.orm import Session

from tpo.backoff import backoff_seconds
from tpo.core.status import HELD, TERMINAL
from tpo.db import Queries, now, writing
from tpo.jobs.claims import Pair, next_waiting_job, waiting_pairs
from tpo.jobs.events import Event
from tpo.jobs.outcomes import Outcome, outcome_of_deadline
from tpo.jobs.records import read_state
from tpo.jobs.scheduling import Rules
from tpo.jobs.tables import Job, LastClaim, Worker
from tpo.jobs.transitions import CANCELLED, NO_LEASE, end_job, job_in_status, requeue, transition, update_job

_SWEEP_BATCH = 500
_T = TypeVar("_T")


@dataclass(frozen=True)
class QueuedJob:
    """A queued job of which workers should be notified."""

    job_id: str
    model: str


class MaintenanceQueries(Queries):
    """The part of the store that the maintenance worker uses. It works for every tenant."""

    def purge(self, retention_seconds: float, batch: int = 100) -> int:
        """Delete a batch of jobs that ended before the retention period, the oldest first. Returns their number."""
        expired = select(Job.id).where(Job.completed_at < now() - retention_seconds).order_by(Job.completed_at)
        with writing(self._engine) as session:
            ids = session.scalars(expired.limit(batch).with_for_update(skip_locked=True)).all()
            # The status is checked only here: in the query above, it would lead the planner to another index.
            deleted = delete(Job).where(Job.id.in_(ids), Job.status.in_(TERMINAL)).returning(Job.id)
            return len(session.scalars(deleted).all())

    def purge_last_claims(self, seconds: float) -> int:
        """Delete records of last claims older than `seconds`, which no longer matter. Returns their number."""
        with writing(self._engine) as session:
            old = delete(LastClaim).where(LastClaim.claimed_at < now() - seconds).returning(LastClaim.tenant)
            return len(session.scalars(old).all())

    def sweep(
        self, *, renotify_seconds: float, worker_retention_seconds: float, rules: Rules | None = None
    ) -> Sequence[QueuedJob]:
        """Rescue lost jobs, end those past their deadline or attempts, and return those to notify workers of.

        One job is returned for each queue that a delayed job has just entered, or in which a job has waited for
        `renotify_seconds`. A notified worker sends the next wake-up while more jobs wait.
        """
        with writing(self._engine) as session:
            session.execute(delete(Worker).where(Worker.seen_at < now() - worker_retention_seconds))
            lost = and_(Job.status.in_(HELD), Job.lease_until < now())
            for job in session.scalars(_skip_locked(select(Job).where(lost))).all():
                _rescue(session, job)
            overdue = and_(Job.status.in_(("queued", "paused")), Job.deadline_at < now())
            for job in session.scalars(_skip_locked(select(Job).where(overdue))).all():
                _end_overdue(session, job)
            # Jobs that were just rescued are among them, so they need no notification of their own.
            due = and_(Job.status == literal_column("'queued'"), Job.next_attempt_at <= now())
            due_ids = session.scalars(_skip_locked(select(Job.id).where(due).order_by(Job.next_attempt_at))).all()
            requeued = update_job(Job.id.in_(due_ids), {"next_attempt_at": None, "queued_at": now()})
            rows = session.execute(requeued.returning(Job.model, Job.reward_model)).all() if due_ids else []
            changed = {Pair(row.model, row.reward_model) for row in rows}
            waiting = []
            for pair in waiting_pairs(session):
                min_wait = None if pair in changed else renotify_seconds
                if job_id := next_waiting_job(session, pair, rules or Rules(), waiting_seconds=min_wait):
                    waiting.append(QueuedJob(job_id, pair.model))
            return waiting


def _skip_locked(query: Select[_T]) -> Select[_T]:
    """Skip locked rows; waiting for them could deadlock."""
    return query.limit(_SWEEP_BATCH).with_for_update(skip_locked=True)


def _rescue(session: Session, job: Job) -> None:
    """Requeue a job whose lease expired; end it if it was cancelled or has no attempt left."""
    which = and_(Job.id == job.id, Job.fence == job.fence, Job.status == job.status, Job.lease_until < now())
    if job.status == "cancelling":
        transition(session, which, CANCELLED, Event("job.cancelled", {}))
    elif job.consecutive_failures >= job.max_attempts:
        message = f"{job.consecutive_failures} attempts in a row ended without a step, the last with its worker."
        end_job(session, which, Outcome("failed", error_code="worker_lost", error_message=message))
    else:
        delay = _delay_after(job.consecutive_failures)
        requeue(session, which, {"next_attempt_at": now() + delay, **NO_LEASE}, delay, "worker_lost")


def _delay_after(consecutive_failures: int) -> float:
    """Return the delay of a job whose worker was lost: none at first, then with jitter, to spread lost jobs."""
    return 0.0 if consecutive_failures < 2 else backoff_seconds(consecutive_failures)


def _end_overdue(session: Session, job: Job) -> None:
    """End a waiting job that is past its deadline, with its best candidate if it has one."""
    try:
        outcome = outcome_of_deadline(read_state(session, job))
    except ValidationError:
        outcome = Outcome("expired")  # recorded by another version; it must not stop the sweep
    end_job(session, job_in_status(job.id, job.status), outcome)
