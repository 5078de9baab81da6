"""Quotas of a tenant: jobs in flight, and jobs per minute."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tpo.core.errors import QuotaExceededError
from tpo.core.status import LIVE
from tpo.db import id_at, now
from tpo.jobs.tables import Job
from tpo.tenants.tables import Tenant
from tpo.tenants.tenants import Limits, ensure_tenant, limits_of_tenant

_WINDOW_SECONDS = 60.0
_IN_FLIGHT_RETRY_SECONDS = 5.0
"""When a job will end is unknown; a client that retries at this pace costs little."""


@dataclass(frozen=True)
class RateLimitStatus:
    """The remaining quota of a tenant in this minute."""

    limit: int
    remaining: int
    reset: float
    """Seconds until the remaining quota grows."""


def check_quota(session: Session, tenant: str, limits: Limits) -> RateLimitStatus | None:
    """Check the quota for one more job, in the transaction that creates it. Raises QuotaExceededError."""
    limits = limits_of_tenant(session, tenant, limits)
    if limits.in_flight is None and limits.per_minute is None:
        return None
    # Jobs of one tenant are counted one at a time; otherwise two requests would both find the last free slot.
    ensure_tenant(session, tenant)
    session.execute(select(Tenant.id).where(Tenant.id == tenant).with_for_update())
    room = _room_of_minute(session, tenant, limits.per_minute) if limits.per_minute is not None else None
    if limits.in_flight is not None and _in_flight(session, tenant, limits.in_flight) >= limits.in_flight:
        raise QuotaExceededError(
            f"{limits.in_flight} jobs may be in flight, and so many are: wait until one has ended.",
            "too_many_jobs_in_flight",
            _IN_FLIGHT_RETRY_SECONDS,
            limits.in_flight,
            0,
            _IN_FLIGHT_RETRY_SECONDS,
        )
    return room


def _in_flight(session: Session, tenant: str, most: int) -> int:
    """Count live jobs; counting stops at `most`."""
    flying = select(Job.id).where(Job.tenant == tenant, Job.status.in_(LIVE)).limit(most)
    return session.execute(select(func.count()).select_from(flying.subquery())).scalar_one()


def _room_of_minute(session: Session, tenant: str, limit: int) -> RateLimitStatus:
    moment = session.execute(select(now())).scalar_one()
    # Ids sort by time of creation: the window is the end of an index.
    since = id_at("job_", moment - _WINDOW_SECONDS)
    lately = select(Job.created_at).where(Job.tenant == tenant, Job.id > since).order_by(Job.id).limit(limit).subquery()
    made, oldest = session.execute(select(func.count(), func.min(lately.c.created_at))).one()
    reset = max(0.0, (oldest if made else moment) + _WINDOW_SECONDS - moment)
    if made >= limit:
        raise QuotaExceededError(
            f"{made} jobs were made within a minute, and {limit} are allowed.",
            "rate_limit_exceeded",
            reset,
            limit,
            0,
            reset,
        )
    return RateLimitStatus(limit, limit - made - 1, reset)


def free_slots(session: Session, tenant: str, limits: Limits) -> int | None:
    """Return how many more jobs of the tenant may be in flight; None if nothing limits it."""
    most = limits_of_tenant(session, tenant, limits).in_flight
    return None if most is None else max(0, most - _in_flight(session, tenant, most))
