"""Quotas of a tenant: jobs in flight, jobs per minute, and stored bytes."""

from dataclasses import dataclass

from sqlalchemy import column, func, select, table
from sqlalchemy.orm import Session

from tpo.core.errors import QuotaExceededError
from tpo.core.status import LIVE
from tpo.db import id_at, now
from tpo.jobs.tables import Job
from tpo.tenants.tables import Tenant
from tpo.tenants.tenants import Limits, ensure_tenant, limits_of_tenant

_WINDOW_SECONDS = 60.0
_IN_FLIGHT_RETRY_SECONDS = 5.0
"""It is unknown when a job will end; a client that retries at this interval costs little."""

_STORED_RETRY_SECONDS = 60.0
"""Only a deletion frees bytes: the tenant's own, or that of the retention."""

_FILES = table("files", column("tenant"), column("bytes"))
"""The table of files belongs to batches, which are above jobs."""

TOO_MANY_IN_FLIGHT = "The limit of {} jobs in flight is reached. Wait until a job has ended."
TOO_MANY_STORED_BYTES = "The limit of {} stored bytes is reached. Delete jobs or files."
TOO_MANY_PER_MINUTE = "The limit of {} jobs per minute is reached. Wait before you create another job."


@dataclass(frozen=True)
class RateLimitStatus:
    """The remaining quota of a tenant in this minute."""

    limit: int
    remaining: int
    reset: float
    """Seconds until the remaining quota grows."""


def check_quota(session: Session, tenant: str, limits: Limits, new_bytes: int) -> RateLimitStatus | None:
    """Check the quota for one more job with an input of `new_bytes`, in the transaction that creates it.

    Raises QuotaExceededError.
    """
    limits = limits_of_tenant(session, tenant, limits)
    if limits.in_flight is None and limits.per_minute is None and limits.stored_bytes is None:
        return None
    _lock(session, tenant)
    if limits.stored_bytes is not None:
        _check_stored_bytes(session, tenant, limits.stored_bytes, new_bytes)
    rate_limit = _remaining_this_minute(session, tenant, limits.per_minute) if limits.per_minute is not None else None
    if limits.in_flight is not None and _in_flight(session, tenant, limits.in_flight) >= limits.in_flight:
        raise QuotaExceededError(
            TOO_MANY_IN_FLIGHT.format(limits.in_flight),
            "too_many_jobs_in_flight",
            _IN_FLIGHT_RETRY_SECONDS,
            limits.in_flight,
            0,
            _IN_FLIGHT_RETRY_SECONDS,
        )
    return rate_limit


def check_stored_bytes(session: Session, tenant: str, limits: Limits) -> None:
    """Check that a tenant has not stored too much, in the transaction that stores a file. Raises QuotaExceededError."""
    limit = limits_of_tenant(session, tenant, limits).stored_bytes
    if limit is not None:
        _lock(session, tenant)
        _check_stored_bytes(session, tenant, limit, 0)


def _lock(session: Session, tenant: str) -> None:
    # The tenant's row is locked while its jobs are counted; otherwise two requests could both take the last free slot.
    ensure_tenant(session, tenant)
    session.execute(select(Tenant.id).where(Tenant.id == tenant).with_for_update())


def _check_stored_bytes(session: Session, tenant: str, limit: int, new_bytes: int) -> None:
    inputs = select(func.coalesce(func.sum(Job.input_bytes), 0)).where(Job.tenant == tenant)
    files = select(func.coalesce(func.sum(_FILES.c.bytes), 0)).where(_FILES.c.tenant == tenant)
    stored = int(session.execute(inputs).scalar_one() + session.execute(files).scalar_one())
    if stored + new_bytes > limit:
        raise QuotaExceededError(
            TOO_MANY_STORED_BYTES.format(limit),
            "too_many_stored_bytes",
            _STORED_RETRY_SECONDS,
            limit,
            max(0, limit - stored),
            _STORED_RETRY_SECONDS,
        )


def _in_flight(session: Session, tenant: str, limit: int) -> int:
    """Count live jobs; counting stops at `limit`."""
    live_jobs = select(Job.id).where(Job.tenant == tenant, Job.status.in_(LIVE)).limit(limit)
    return session.execute(select(func.count()).select_from(live_jobs.subquery())).scalar_one()


def _remaining_this_minute(session: Session, tenant: str, limit: int) -> RateLimitStatus:
    """Return the quota that remains in this minute after one more job. Raises QuotaExceededError."""
    current_time = session.execute(select(now())).scalar_one()
    # Ids sort by time of creation: the window is the end of an index.
    since = id_at("job_", current_time - _WINDOW_SECONDS)
    recent = select(Job.created_at).where(Job.tenant == tenant, Job.id > since).order_by(Job.id).limit(limit).subquery()
    count, oldest = session.execute(select(func.count(), func.min(recent.c.created_at))).one()
    reset = max(0.0, (oldest if count else current_time) + _WINDOW_SECONDS - current_time)
    if count >= limit:
        raise QuotaExceededError(
            TOO_MANY_PER_MINUTE.format(limit),
            "rate_limit_exceeded",
            reset,
            limit,
            0,
            reset,
        )
    return RateLimitStatus(limit, limit - count - 1, reset)


def free_slots(session: Session, tenant: str, limits: Limits) -> int | None:
    """Return how many more jobs of the tenant may be in flight; None if there is no limit."""
    limit = limits_of_tenant(session, tenant, limits).in_flight
    return None if limit is None else max(0, limit - _in_flight(session, tenant, limit))
