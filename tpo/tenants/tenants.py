"""Tenants and their limits."""

import re
from dataclasses import dataclass
from typing import cast

from sqlalchemy import Table, bindparam, select
from sqlalchemy.orm import Session

from tpo.core.errors import InvalidInputError
from tpo.db import Queries, insert_if_new, now, writing
from tpo.tenants.tables import Tenant

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def ensure_tenant(session: Session, tenant: str) -> None:
    """Create a tenant if it does not exist. Raises InvalidInputError if its name is invalid."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidInputError(
            f"{tenant!r} is no valid tenant: use 1 to 64 of A-Za-z0-9._-, with a letter or digit first.", "tenant"
        )
    if session.get(Tenant, tenant) is None:
        session.execute(insert_if_new(session, Tenant).values(id=tenant, created_at=now()))  # another may win


_TENANTS = cast("Table", Tenant.__table__).c
_LIMITS = select(
    _TENANTS.max_jobs_in_flight,
    _TENANTS.max_jobs_per_minute,
    _TENANTS.max_jobs_running,
    _TENANTS.max_stored_bytes,
).where(_TENANTS.id == bindparam("tenant"))


@dataclass(frozen=True)
class Limits:
    """Limits of a tenant. None is no limit."""

    in_flight: int | None = None
    per_minute: int | None = None
    running: int | None = None
    """Maximum number of jobs that run at once. The others in flight wait."""
    stored_bytes: int | None = None
    """Maximum number of bytes of the inputs of jobs, and of files."""


def limits_of_tenant(session: Session, tenant: str, limits: Limits) -> Limits:
    """Return the limits of a tenant: its own, or those of `limits` where it has none."""
    own = session.execute(_LIMITS, {"tenant": tenant}).one_or_none()
    if own is None:
        return limits
    return Limits(
        limits.in_flight if own.max_jobs_in_flight is None else own.max_jobs_in_flight,
        limits.per_minute if own.max_jobs_per_minute is None else own.max_jobs_per_minute,
        limits.running if own.max_jobs_running is None else own.max_jobs_running,
        limits.stored_bytes if own.max_stored_bytes is None else own.max_stored_bytes,
    )


class TenantQueries(Queries):
    """The part of the store that holds tenants."""

    def set_limits(self, tenant: str, limits: Limits) -> None:
        """Set a tenant's own limits, creating the tenant if it is new; None restores the settings' limit."""
        with writing(self._engine) as session:
            ensure_tenant(session, tenant)
            row = session.get_one(Tenant, tenant)
            row.max_jobs_in_flight, row.max_jobs_per_minute = limits.in_flight, limits.per_minute
            row.max_jobs_running, row.max_stored_bytes = limits.running, limits.stored_bytes
