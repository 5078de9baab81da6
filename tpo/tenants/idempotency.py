"""Requests that are said twice: a key names one, in the transaction that makes what is asked for."""

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
"""Other processes that may be quicker with the same request, one after another."""

_T = TypeVar("_T")

# Built once: a statement costs more to build than to run.
_SAME = (IdempotencyKey.tenant == bindparam("tenant"), IdempotencyKey.key == bindparam("key"))
_SAID = select(
    IdempotencyKey,
    (IdempotencyKey.created_at < now() - bindparam("keep_seconds", type_=Double())).label("forgotten"),
).where(*_SAME)
_REMEMBER = insert(cast("Table", IdempotencyKey.__table__)).values(created_at=now())


@dataclass(frozen=True)
class IdempotencyRequest:
    """What names a request, so that said twice it is done once."""

    fingerprint: str
    """A hash of all that was asked for, and of where."""
    key: str | None = None
    """The client's Idempotency-Key."""
    keep_seconds: float = 24 * 3600


def find_existing(session: Session, tenant: str, once: IdempotencyRequest | None) -> IdempotencyKey | None:
    """What the same request has made before. Raises IdempotencyConflictError."""
    if once is None or once.key is None:
        return None
    named = {"tenant": tenant, "key": once.key}
    found = session.execute(_SAID, {**named, "keep_seconds": once.keep_seconds}).one_or_none()
    if found is None:
        return None
    said: IdempotencyKey = found[0]
    if found.forgotten:
        session.execute(delete(IdempotencyKey).where(*_SAME), named)
        session.expunge(said)
        return None
    if said.fingerprint != once.fingerprint:
        raise IdempotencyConflictError()
    return said


def record_key(session: Session, tenant: str, once: IdempotencyRequest | None, **made: str) -> None:
    """Remember what a request makes: its `job_id`, `file_id` or `batch_id`."""
    if once is not None and once.key is not None:
        values: dict[str, Any] = {"tenant": tenant, "key": once.key, "fingerprint": once.fingerprint, **made}
        session.execute(_REMEMBER, values)


def create_idempotently(engine: Engine, make: Callable[[Session], _T]) -> _T:
    """Make it in one transaction; where another process has said the same meanwhile, look again. Both see the first."""
    for _ in range(MAX_CONFLICT_RETRIES):
        try:
            return write(engine, make)
        except IntegrityError:
            continue  # the next round finds what the other has made
    raise StoreUnavailableError()


class IdempotencyQueries(Queries):
    """The part of the store that keeps idempotency keys."""

    def purge(self, seconds: float, batch: int = 500) -> int:
        """Forget a batch of the names that requests were given so long ago. How many."""
        old = select(IdempotencyKey.tenant, IdempotencyKey.key).where(IdempotencyKey.created_at < now() - seconds)
        with writing(self._engine) as session:
            oldest = old.order_by(IdempotencyKey.created_at).limit(batch).with_for_update(skip_locked=True)
            names = [{"of": row.tenant, "name": row.key} for row in session.execute(oldest)]
            # One by one: SQLite searches no index for a list of pairs.
            one = and_(IdempotencyKey.tenant == bindparam("of"), IdempotencyKey.key == bindparam("name"))
            if names:
                session.connection().execute(delete(IdempotencyKey).where(one), names)
            return len(names)
