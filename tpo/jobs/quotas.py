"""How much a tenant may ask for: jobs in flight, and jobs a minute."""

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
"""Nobody knows when a job ends; a client that asks so often costs little."""


@dataclass(frozen=True)
class RateLimitStatus:
    """What a tenant may still ask for in this minute."""

    limit: int
    remaining: int
    reset: float
    """Seconds until there is more room than now."""


def check_quota(session: Session, tenant: str, limits: Limits) -> RateLimitStatus | None:
    """What is left once one more job is made, in the transaction that makes it. Raises QuotaExceededError."""
    limits = limits_of_tenant(session, tenant, limits)
    if limits.in_flight is None and limits.per_minute is None:
        return None
    # One job of a tenant is counted at a time, or two at once would both find the last place free.
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
    """Jobs in flight, counted up to the limit: more of them make the count no longer."""
    flying = select(Job.id).where(Job.tenant == tenant, Job.status.in_(LIVE)).limit(most)
    return session.execute(select(func.count()).select_from(flying.subquery())).scalar_one()


def _room_of_minute(session: Session, tenant: str, limit: int) -> RateLimitStatus:
    moment = session.execute(select(now())).scalar_one()
    # Ids sort by the time of their making: the window is the end of an index.
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
    """Return how many more jobs of the tenant may be in flight; None where nothing limits it."""
    most = limits_of_tenant(session, tenant, limits).in_flight
    return None if most is None else max(0, most - _in_flight(session, tenant, most))
