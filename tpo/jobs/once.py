"""Requests that are said twice: a key names one, in the transaction that makes what is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sqlalchemy import Double, Engine, Table, bindparam, delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tpo.errors import SameKeyOtherBody, StoreUnavailable
from tpo.jobs.database import now, write
from tpo.jobs.tables import IdempotencyKey

RACES = 5
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
class Once:
    """What names a request, so that said twice it is done once."""

    fingerprint: str
    """A hash of all that was asked for, and of where."""
    key: str | None = None
    """The client's Idempotency-Key."""
    keep_seconds: float = 24 * 3600


def said_before(session: Session, tenant: str, once: Once | None) -> IdempotencyKey | None:
    """What the same request has made before. Raises SameKeyOtherBody."""
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
        raise SameKeyOtherBody()
    return said


def remember(session: Session, tenant: str, once: Once | None, **made: str) -> None:
    """Remember what a request makes: its `job_id`, `file_id` or `batch_id`."""
    if once is not None and once.key is not None:
        values: dict[str, Any] = {"tenant": tenant, "key": once.key, "fingerprint": once.fingerprint, **made}
        session.execute(_REMEMBER, values)


def unless_said(engine: Engine, make: Callable[[Session], _T]) -> _T:
    """Make it in one transaction; where another process has said the same meanwhile, look again. Both see the first."""
    for _ in range(RACES):
        try:
            return write(engine, make)
        except IntegrityError:
            continue  # the next round finds what the other has made
    raise StoreUnavailable()
