"""Leases: claim a job, record its steps, renew, finish and release it. Every write is fenced."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, and_, case, exists, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from tpo.backoff import backoff_seconds
from tpo.core.errors import LeaseLostError
from tpo.core.loop import Step, locate
from tpo.core.state import State
from tpo.core.status import HELD, Status
from tpo.db import Queries, now, reading, write, writing
from tpo.jobs import events
from tpo.jobs.events import Event
from tpo.jobs.outcomes import Outcome, final_event
from tpo.jobs.records import progress_columns, read_state, save_step
from tpo.jobs.tables import Job, Queue, Worker
from tpo.jobs.transitions import (
    CANCELLED,
    ENDED,
    NO_LEASE,
    UNCOUNTED,
    end_job,
    insert_events,
    job_in_status,
    record,
    requeue,
    transition,
    update_job,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """A worker's right to write to one job, until another worker claims the job."""

    job_id: str
    worker: str
    fence: int
    attempt: int
    consecutive_failures: int
    max_attempts: int
    seconds: float
    quarantine: str | None = None
    """The job's quarantine group. After one recorded step the job is cleared, and is handed back."""


@dataclass(frozen=True)
class Flags:
    """Flags that the holder of a lease must react to."""

    cancel_requested: bool
    past_deadline: bool
    pause_requested: bool = False
    queue_paused: bool = False


class CheckpointQueries(Queries):
    """Writes by the holder of a lease. Workers serve every tenant."""

    def checkpoint(self, lease: Lease, step: Step) -> Flags:
        """Record one model call and all its changes. Raises LeaseLostError, and then writes nothing."""
        new_events = events.step_events(step)
        values = {
            "lease_until": now() + lease.seconds,
            "progressed_at": now(),
            "consecutive_failures": 0,
            "quarantine": None,
            **progress_columns(step.after, step.position),
        }

        def save(session: Session) -> Flags:
            flags = self._fenced(session, lease, values, new_events)
            save_step(session, lease.job_id, step)
            return flags

        try:
            return write(self._engine, save)
        except IntegrityError:
            # The first try was committed, but its acknowledgement was lost. This is the second try.
            with writing(self._engine) as session:
                flags = self._fenced(session, lease, {"lease_until": now() + lease.seconds}, [])
                if read_state(session, session.get_one(Job, lease.job_id)) != step.after:
                    raise
                return flags

    def check(self, worker: str, job_ids: Iterable[str]) -> dict[str, tuple[int, Flags]]:
        """Return the fencing number and the flags of those jobs that the worker still holds."""
        with reading(self._engine) as session:
            rows = session.execute(select(Job.id, Job.fence, *_FLAGS).where(_held_by_worker(worker, job_ids)))
            return {row.id: (row.fence, _flags(row)) for row in rows}

    def renew(self, worker: str, job_ids: Iterable[str], lease_seconds: float) -> dict[str, tuple[int, Flags]]:
        """Renew a worker's leases. Returns the fencing number and the flags of those that it still holds."""
        with writing(self._engine) as session:
            session.execute(update(Worker).where(Worker.id == worker).values(seen_at=now()))
            rows = session.execute(
                update_job(_held_by_worker(worker, job_ids), {"lease_until": now() + lease_seconds}).returning(
                    Job.id, Job.fence, *_FLAGS
                )
            )
            return {row.id: (row.fence, _flags(row)) for row in rows}

    def finish(self, lease: Lease, outcome: Outcome) -> Status:
        """End a job. A cancel that was requested in the meantime wins. Raises LeaseLostError."""
        cancelled = Job.status == "cancelling"
        values: dict[str, Any] = {
            name: case((cancelled, None), else_=getattr(outcome, name))
            for name in ("output", "error_code", "error_message", "incomplete_reason", "stop_reason")
        }
        values |= {
            **ENDED,
            "status": case((cancelled, "cancelled"), else_=outcome.status),
        }

        def end(session: Session) -> Status:
            job = session.scalars(update_job(_held_by(lease), values).returning(Job)).one_or_none()
            if job is None:
                same = and_(Job.status == outcome.status, Job.output.is_not_distinct_from(outcome.output))
                return _status_if_already_done(session, lease, same)
            record(session, job, [final_event(job)])
            return job.status

        return write(self._engine, end)

    def release(self, lease: Lease, *, delay_seconds: float | None = None, reason: str | None = None) -> Status:
        """Hand a job back. With a delay, it was a failed attempt for that reason; otherwise the attempt does not count.

        It is queued, or paused or cancelled if that was requested in the meantime. Raises LeaseLostError.
        """
        values: dict[str, Any] = {"queued_at": now(), **NO_LEASE}
        if delay_seconds is None:
            values |= UNCOUNTED
        else:
            # With a delay of 0, the job is in the queue at once, at its old place.
            values["next_attempt_at"] = now() + delay_seconds if delay_seconds else None
        with writing(self._engine) as session:
            wanted, unwanted = (and_(_held_by(lease), Job.status == s) for s in HELD)
            if status := requeue(session, wanted, values, delay_seconds, reason):
                return status
            if not transition(session, unwanted, CANCELLED, Event("job.cancelled", {})):
                return _status_if_already_done(session, lease, job_in_status(lease.job_id, "queued", "paused"))
            return "cancelled"

    def forgive(self, lease: Lease) -> None:
        """Take back an attempt that ended because its worker could not reach the database.

        Hands the job back if the lease is still held. Changes nothing if the job has ended or was claimed since.
        """
        rescued = and_(job_in_status(lease.job_id, "queued", "paused"), Job.fence == lease.fence)
        counted = and_(Job.consecutive_failures == lease.consecutive_failures, Job.consecutive_failures > 0)
        fewer = {"consecutive_failures": Job.consecutive_failures - 1, "attempt": Job.attempt - 1}
        with writing(self._engine) as session:
            session.execute(update_job(and_(rescued, counted), fewer))
        with suppress(LeaseLostError):
            self.release(lease)

    def expire(self, lease: Lease) -> None:
        """Let a lease expire now: the job is lost with its worker, and the rescuer decides about its attempt."""
        with writing(self._engine) as session:
            session.execute(update_job(_held_by(lease), {"lease_until": now()}))

    def _fenced(self, session: Session, lease: Lease, values: dict[str, Any], events: list[Event]) -> Flags:
        """Update the job and insert its events, if the lease is still held. Raises LeaseLostError."""
        values = {**values, "last_event": Job.last_event + len(events)}
        row = session.execute(update_job(_held_by(lease), values).returning(Job.last_event, *_FLAGS)).one_or_none()
        if row is None:
            raise LeaseLostError()
        insert_events(session, lease.job_id, row.last_event - len(events) + 1, events)
        return _flags(row)


def _read_or_requeue(session: Session, job: Job) -> State | None:
    """Read the record of a job that was just claimed; if this version cannot read it, delay or fail the job.

    The attempt counts, so that a job that no worker can read fails in the end.
    """
    try:
        return read_state(session, job)
    except ValidationError:
        _log.error("%s cannot be run: this version cannot read its record", job.id)
    which = and_(job_in_status(job.id, "in_progress"), Job.fence == job.fence)
    if job.consecutive_failures < job.max_attempts:
        delay = backoff_seconds(job.consecutive_failures)
        requeue(session, which, {"next_attempt_at": now() + delay, **NO_LEASE}, delay)
        return None
    message = "The job's record cannot be read by this version of the server; submit the job again."
    end_job(session, which, Outcome("failed", error_code="unreadable_record", error_message=message))
    return None


def _status_if_already_done(session: Session, lease: Lease, wanted: ColumnElement[bool]) -> Status:
    """Return the status of a job whose previous commit succeeded although its acknowledgement was lost.

    Raises LeaseLostError if the status is another one, or if the job was claimed since.
    """
    cancelled = and_(Job.status == "cancelled", Job.cancel_requested_at.is_not(None))
    ours = and_(Job.id == lease.job_id, Job.fence == lease.fence, Job.lease_owner.is_(None))
    status = session.scalars(select(Job.status).where(ours, or_(wanted, cancelled))).one_or_none()
    if status is None:
        raise LeaseLostError()
    return status


def claimable() -> ColumnElement[bool]:
    """Match queued jobs that can be claimed."""
    return and_(
        Job.status == "queued",
        Job.next_attempt_at.is_(None),
        Job.consecutive_failures < Job.max_attempts,
        or_(Job.deadline_at.is_(None), Job.deadline_at > now()),
    )


def claim_job(
    session: Session, which: ColumnElement[bool], worker: str, lease_seconds: float
) -> tuple[Lease, State] | None:
    """Claim the one job that matches, and return its lease and recorded state; None if it cannot be claimed."""
    values: dict[str, Any] = {
        "status": "in_progress",
        "lease_owner": worker,
        "lease_until": now() + lease_seconds,
        "lost_together": False,
        "fence": Job.fence + 1,
        "attempt": Job.attempt + 1,
        "consecutive_failures": Job.consecutive_failures + 1,
        "started_at": case((Job.started_at.is_(None), now()), else_=Job.started_at),
    }
    job = session.scalars(update_job(and_(which, claimable()), values).returning(Job)).one_or_none()
    if job is None:
        return None
    state = _read_or_requeue(session, job)
    if state is None:
        return None
    position = locate(state)
    progress = {"iteration": position.iteration, "phase": position.phase}
    record(session, job, events.claim_events(position, job.attempt), progress)
    counts = (job.attempt, job.consecutive_failures, job.max_attempts)
    return Lease(job.id, worker, job.fence, *counts, lease_seconds, job.quarantine), state


def queue_is_paused(model: ColumnElement[str] | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """Match policies whose queue is paused."""
    return exists(select(1).where(Queue.model == model, Queue.paused_at > 0).correlate(Job))


_FLAGS = (
    (Job.status == "cancelling").label("cancel_requested"),
    case((Job.deadline_at < now(), True), else_=False).label("past_deadline"),
    # Not IS NOT NULL: in a RETURNING, SQLite 3.40 returns true for null.
    case((Job.pause_requested_at > 0, True), else_=False).label("pause_requested"),
    queue_is_paused(Job.model).label("queue_paused"),
)


def _flags(row: Any) -> Flags:
    flags = (row.cancel_requested, row.past_deadline, row.pause_requested, row.queue_paused)
    return Flags(*map(bool, flags))


def _held_by(lease: Lease) -> ColumnElement[bool]:
    """Match the job of a lease while the lease is held."""
    return and_(job_in_status(lease.job_id, *HELD), Job.fence == lease.fence, Job.lease_owner == lease.worker)


def _held_by_worker(worker: str, job_ids: Iterable[str]) -> ColumnElement[bool]:
    """Match those of the jobs that a worker holds."""
    return and_(Job.id.in_(list(job_ids)), Job.lease_owner == worker, Job.status.in_(HELD))
