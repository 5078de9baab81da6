"""Maintenance: rescue lost jobs, end late ones, find waiting jobs to notify workers of, and delete old rows."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Select, and_, delete, func, literal_column, select
from sqlalchemy.orm import Session

from tpo.backoff import backoff_seconds
from tpo.core.status import HELD, TERMINAL
from tpo.db import Queries, now, reading, writing
from tpo.jobs.claims import RUNNING, Pair, next_waiting_job, waiting_pairs
from tpo.jobs.events import Event
from tpo.jobs.outcomes import Outcome, outcome_of_deadline
from tpo.jobs.quarantine import LostJob, split_suspects
from tpo.jobs.records import read_state
from tpo.jobs.scheduling import Rules
from tpo.jobs.tables import Job, LastClaim, Worker
from tpo.jobs.transitions import CANCELLED, NO_LEASE, UNCOUNTED, end_job, job_in_status, requeue, transition, update_job

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

    def rescue_delay(self) -> float:
        """Return for how long the oldest expired lease has waited for the rescuer, in seconds; 0 if there is none."""
        oldest = select(now() - func.min(Job.lease_until)).where(Job.status.in_(RUNNING))
        with reading(self._engine) as session:
            return max(0.0, session.execute(oldest).scalar_one() or 0.0)

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
            _rescue(session, session.scalars(_skip_locked(select(Job).where(lost).order_by(Job.lease_owner))).all())
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


def _rescue(session: Session, lost: Sequence[Job]) -> None:
    """Requeue the jobs whose lease expired, as suspects; only one that was alone in its worker loses an attempt."""
    workers = {job.lease_owner for job in lost}
    held = (Job.status.in_(RUNNING), Job.lease_owner.in_(workers))
    rows = session.execute(select(Job.lease_owner, func.count()).where(*held).group_by(Job.lease_owner)) if lost else ()
    if shared := [worker for worker, count in rows if count > 1]:
        # Their leases expire at different times: the last one must not look as if it had been alone.
        company = and_(Job.status.in_(RUNNING), Job.lease_owner.in_(shared))
        ids = session.scalars(select(Job.id).where(company).with_for_update(skip_locked=True)).all()
        session.execute(update_job(Job.id.in_(ids), {"lost_together": True}))
    for worker in sorted(workers, key=str):
        jobs = {job.id: job for job in lost if job.lease_owner == worker}
        for job in jobs.values():
            if job.status == "cancelling":
                transition(session, _still_lost(job), CANCELLED, Event("job.cancelled", {}))
        suspects = [LostJob(job.id, job.tenant) for job in jobs.values() if job.status != "cancelling"]
        for group in split_suspects(suspects):
            name = secrets.token_hex(8)
            for job in map(jobs.__getitem__, group):
                if worker in shared or job.lost_together:
                    _requeue_suspect(session, job, name, len(group), 0.0, UNCOUNTED)
                else:
                    _count_attempt(session, job, name)


def _count_attempt(session: Session, job: Job, group: str) -> None:
    """Requeue a job that was alone in its worker; end it if it has no attempt left."""
    if job.consecutive_failures >= job.max_attempts:
        message = f"{job.consecutive_failures} attempts in a row ended without a step, the last with its worker."
        outcome = Outcome("failed", error_code="worker_lost", error_message=message)
        end_job(session, _still_lost(job), outcome)
    else:
        _requeue_suspect(session, job, group, 1, _delay_after(job.consecutive_failures), {})


def _requeue_suspect(session: Session, job: Job, group: str, size: int, delay: float, values: dict[str, Any]) -> None:
    """Requeue a lost job in a quarantine group of `size` jobs, after a delay."""
    values = {**values, "quarantine": group, "lost_with": job.lease_owner, "next_attempt_at": now() + delay, **NO_LEASE}
    requeue(session, _still_lost(job), values, delay, "worker_lost", suspects=size)


def _still_lost(job: Job) -> ColumnElement[bool]:
    """Match a job if its expired lease was neither renewed nor ended in the meantime."""
    return and_(Job.id == job.id, Job.fence == job.fence, Job.status == job.status, Job.lease_until < now())


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
