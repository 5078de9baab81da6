"""Idempotency keys, looked up and recorded in the transaction that creates the resource."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sqlalchemy import Double, Engine, Table, and_, bindparam, delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tpo.core.errors import IdempotencyConflictError, StoreUnavailableError
from tpo.db import Queries, now, write, writing
from tpo.tenants.tables import IdempotencyKey

MAX_CONFLICT_RETRIES = 5
"""How many concurrent requests with the same key may win, one after another."""

_T = TypeVar("_T")

# Built once: building a statement costs more than running it.
_SAME = (IdempotencyKey.tenant == bindparam("tenant"), IdempotencyKey.key == bindparam("key"))
_SAID = select(
    IdempotencyKey,
    (IdempotencyKey.created_at < now() - bindparam("keep_seconds", type_=Double())).label("forgotten"),
).where(*_SAME)
_REMEMBER = insert(cast("Table", IdempotencyKey.__table__)).values(created_at=now())


@dataclass(frozen=True)
class IdempotencyRequest:
    """The identity of a request: repeated, it creates nothing new."""

    fingerprint: str
    """A hash of path and body."""
    key: str | None = None
    """The client's Idempotency-Key header."""
    keep_seconds: float = 24 * 3600


def find_existing(session: Session, tenant: str, once: IdempotencyRequest | None) -> IdempotencyKey | None:
    """Return what the same request created before. Raises IdempotencyConflictError."""
    if once is None or once.key is None:
        return None
    named = {"tenant": tenant, "key": once.key}
    found = session.execute(_SAID, {**named, "keep_seconds": once.keep_seconds}).one_or_none()
    if found is None:
        return None
    known: IdempotencyKey = found[0]
    if found.forgotten:
        session.execute(delete(IdempotencyKey).where(*_SAME), named)
        session.expunge(known)
        return None
    if known.fingerprint != once.fingerprint:
        raise IdempotencyConflictError()
    return known


def record_key(session: Session, tenant: str, once: IdempotencyRequest | None, **made: str) -> None:
    """Record what a request creates: its `job_id`, `file_id` or `batch_id`."""
    if once is not None and once.key is not None:
        values: dict[str, Any] = {"tenant": tenant, "key": once.key, "fingerprint": once.fingerprint, **made}
        session.execute(_REMEMBER, values)


def create_idempotently(engine: Engine, make: Callable[[Session], _T]) -> _T:
    """Create in one transaction; retry if a concurrent request with the same key won."""
    for _ in range(MAX_CONFLICT_RETRIES):
        try:
            return write(engine, make)
        except IntegrityError:
            continue  # the next round finds what the other request created
    raise StoreUnavailableError()


class IdempotencyQueries(Queries):
    """The part of the store that holds idempotency keys."""

    def purge(self, seconds: float, batch: int = 500) -> int:
        """Delete a batch of keys that are older. Returns how many."""
        old = select(IdempotencyKey.tenant, IdempotencyKey.key).where(IdempotencyKey.created_at < now() - seconds)
        with writing(self._engine) as session:
            oldest = old.order_by(IdempotencyKey.created_at).limit(batch).with_for_update(skip_locked=True)
            names = [{"of": row.tenant, "name": row.key} for row in session.execute(oldest)]
            # One by one: SQLite searches no index for a list of pairs.
            one = and_(IdempotencyKey.tenant == bindparam("of"), IdempotencyKey.key == bindparam("name"))
            if names:
                session.connection().execute(delete(IdempotencyKey).where(one), names)
            return len(names)
