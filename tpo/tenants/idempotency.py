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
"""Maximum number of concurrent requests with the same key that may win, one after another."""

_T = TypeVar("_T")

# Built once: building a statement costs more than running it.
_SAME_KEY = (IdempotencyKey.tenant == bindparam("tenant"), IdempotencyKey.key == bindparam("key"))
_FIND = select(
    IdempotencyKey,
    (IdempotencyKey.created_at < now() - bindparam("keep_seconds", type_=Double())).label("expired"),
).where(*_SAME_KEY)
_INSERT = insert(cast("Table", IdempotencyKey.__table__)).values(created_at=now())


@dataclass(frozen=True)
class IdempotencyRequest:
    """The identity of a request. A repeated request creates nothing new."""

    fingerprint: str
    """A hash of path and body."""
    key: str | None = None
    """The client's Idempotency-Key header."""
    keep_seconds: float = 24 * 3600
    """Age after which the key may be used for a new request."""


def find_existing(session: Session, tenant: str, request: IdempotencyRequest | None) -> IdempotencyKey | None:
    """Return the record of the same earlier request, or None. Raises IdempotencyConflictError if the body differs."""
    if request is None or request.key is None:
        return None
    parameters = {"tenant": tenant, "key": request.key}
    found = session.execute(_FIND, {**parameters, "keep_seconds": request.keep_seconds}).one_or_none()
    if found is None:
        return None
    known: IdempotencyKey = found[0]
    if found.expired:
        session.execute(delete(IdempotencyKey).where(*_SAME_KEY), parameters)
        session.expunge(known)
        return None
    if known.fingerprint != request.fingerprint:
        raise IdempotencyConflictError()
    return known


def record_key(session: Session, tenant: str, request: IdempotencyRequest | None, **resource: str) -> None:
    """Record the `job_id`, `file_id` or `batch_id` that a request creates."""
    if request is not None and request.key is not None:
        values: dict[str, Any] = {"tenant": tenant, "key": request.key, "fingerprint": request.fingerprint, **resource}
        session.execute(_INSERT, values)


def create_idempotently(engine: Engine, create: Callable[[Session], _T]) -> _T:
    """Run `create` in one transaction; retry if a concurrent request with the same key won."""
    for _ in range(MAX_CONFLICT_RETRIES):
        try:
            return write(engine, create)
        except IntegrityError:
            continue  # the next round finds what the other request created
    raise StoreUnavailableError()


class IdempotencyQueries(Queries):
    """The part of the store that holds idempotency keys."""

    def purge(self, seconds: float, batch: int = 500) -> int:
        """Delete a batch of the keys older than `seconds`, the oldest first. Returns the number of deleted keys."""
        old = select(IdempotencyKey.tenant, IdempotencyKey.key).where(IdempotencyKey.created_at < now() - seconds)
        with writing(self._engine) as session:
            oldest = old.order_by(IdempotencyKey.created_at).limit(batch).with_for_update(skip_locked=True)
            names = [{"of": row.tenant, "name": row.key} for row in session.execute(oldest)]
            # One by one: SQLite uses no index for a list of pairs.
            one = and_(IdempotencyKey.tenant == bindparam("of"), IdempotencyKey.key == bindparam("name"))
            if names:
                session.connection().execute(delete(IdempotencyKey).where(one), names)
            return len(names)
