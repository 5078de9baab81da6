"""Transitions of a job: one conditional UPDATE and the events about it, in the same transaction."""

from typing import Any

from sqlalchemy import ColumnElement, Update, and_, case, insert, update
from sqlalchemy.orm import Session

from tpo.core.status import TERMINAL, Status
from tpo.db import now
from tpo.jobs.events import Event
from tpo.jobs.outcomes import Outcome, final_event
from tpo.jobs.tables import EventRow, Job
from tpo.webhooks.outbox import enqueue_webhooks

NO_LEASE = {"lease_owner": None, "lease_until": None}
UNCOUNTED = {
    "attempt": Job.attempt - 1,
    "consecutive_failures": case((Job.consecutive_failures > 0, Job.consecutive_failures - 1), else_=0),
}
"""Values that undo the count of the attempt that a claim began."""
ENDED = {"completed_at": now(), "phase": None, "pause_requested_at": None, "quarantine": None, **NO_LEASE}
CANCELLED = {"status": "cancelled", **ENDED}


def job_in_status(job_id: str, *statuses: Status) -> ColumnElement[bool]:
    """Match this job if it is in one of these statuses."""
    return and_(Job.id == job_id, Job.status.in_(statuses))


def update_job(which: ColumnElement[bool], values: dict[str, Any]) -> Update:
    """Build an UPDATE of jobs that does not change objects in the session."""
    return update(Job).where(which).values(values).execution_options(synchronize_session=False)


def transition(session: Session, which: ColumnElement[bool], values: dict[str, Any], event: Event) -> bool:
    """Change the one job that matches, and record the event. Returns False if none matches."""
    job = session.scalars(update_job(which, values).returning(Job)).one_or_none()
    if job is None:
        return False
    record(session, job, [event])
    return True


def end_job(session: Session, which: ColumnElement[bool], outcome: Outcome) -> bool:
    """End the one job that matches. Returns False if none matches."""
    return transition(session, which, {**vars(outcome), **ENDED}, final_event(outcome))


def requeue(
    session: Session,
    which: ColumnElement[bool],
    values: dict[str, Any],
    delay_seconds: float | None,
    reason: str | None = None,
    suspects: int | None = None,
) -> Status | None:
    """Requeue the one job that matches, or pause it if that was requested. Returns its status; None if none matches.

    `suspects` is the size of the quarantine group that it enters.
    """
    pause = Job.pause_requested_at.is_not(None)
    values = {**values, "status": case((pause, "paused"), else_="queued"), "pause_requested_at": None}
    job = session.scalars(update_job(which, values).returning(Job)).one_or_none()
    if job is None:
        return None
    why = {"delay_seconds": delay_seconds, "reason": reason}
    if suspects is not None:
        why["suspects"] = suspects
    record(session, job, [Event("job.paused", {}) if job.status == "paused" else Event("job.retrying", why)])
    return job.status


def record(session: Session, job: Job, events: list[Event], values: dict[str, Any] | None = None) -> None:
    """Append events, numbered after the job's last one, and enqueue webhooks if the job has ended.

    The preceding UPDATE has locked the job's row.
    """
    last = job.last_event + len(events)
    session.execute(update_job(Job.id == job.id, {**(values or {}), "last_event": last}))
    insert_events(session, job.id, job.last_event + 1, events)
    session.refresh(job)
    if job.status in TERMINAL:
        _enqueue_webhooks(session, job)


def insert_events(session: Session, job_id: str, first: int, events: list[Event]) -> None:
    """Insert events, numbered from `first`."""
    if events:
        rows = [{"job_id": job_id, "number": n, "type": e.type, "data": e.data} for n, e in enumerate(events, first)]
        session.execute(insert(EventRow), rows)


def _enqueue_webhooks(session: Session, job: Job) -> None:
    """Enqueue webhooks for the end of a job, as a job and as a response of the OpenAI API."""
    response = "incomplete" if job.status == "expired" else job.status
    enqueue_webhooks(
        session,
        job.tenant,
        {
            f"job.{job.status}": job.id,
            f"response.{response}": job.id.replace("job_", "resp_", 1),
        },
    )
