"""Deliveries: what the courier asks. A delivery is claimed before it is sent, and tried again where its sender died."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Select, and_, case, delete, func, select, update
from sqlalchemy.orm import Session

from tpo.db import Queries, now, reading, writing
from tpo.webhooks.endpoints import switch_off
from tpo.webhooks.tables import Delivery, Webhook

AT_ONCE = 4
"""Deliveries that are under way to one webhook: a slow one leaves slots to the others."""


@dataclass(frozen=True)
class ClaimedDelivery:
    """A delivery that this process has claimed: what to send where, and what signs it."""

    delivery_id: str
    webhook_id: str
    url: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    event_id: str
    type: str
    object_id: str
    created_at: float
    attempt: int
    age: float
    """Seconds since the event."""


class DeliveryQueries(Queries):
    """The part of the store that delivers, for every tenant."""

    def due(self, limit: int) -> Sequence[str]:
        """Deliveries to ring for: the longest due of each webhook first."""
        sending = _counted_sending().having(func.count() >= AT_ONCE)
        place = func.row_number().over(partition_by=Delivery.webhook_id, order_by=Delivery.next_attempt_at)
        due = select(Delivery.id, place.label("place")).where(_due(), Delivery.webhook_id.not_in(sending)).subquery()
        query = select(due.c.id).where(due.c.place <= AT_ONCE).order_by(due.c.place).limit(limit)
        with reading(self._engine) as session:
            return session.scalars(query).all()

    def claim(self, delivery_id: str, seconds: float) -> ClaimedDelivery | None:
        """Take a delivery for so long; None where it is not due, or its webhook has enough under way."""
        with writing(self._engine) as session:
            webhook = _open_webhook(session, select(Delivery.webhook_id).where(Delivery.id == delivery_id))
            return _claim(session, webhook, delivery_id, seconds) if webhook else None

    def claim_next(self, webhook_id: str, seconds: float) -> ClaimedDelivery | None:
        """Take the webhook's delivery that is due for longest."""
        query = select(Delivery.id).where(Delivery.webhook_id == webhook_id, _due())
        with writing(self._engine) as session:
            webhook = _open_webhook(session, select(Webhook.id).where(Webhook.id == webhook_id))
            found = session.scalars(query.order_by(Delivery.next_attempt_at).limit(1)).one_or_none()
            return _claim(session, webhook, found, seconds) if webhook and found else None

    def record_success(self, parcel: ClaimedDelivery) -> None:
        """It has arrived."""
        with writing(self._engine) as session:
            values = {"status": "delivered", "ended_at": now(), "last_error": None}
            session.execute(update(Delivery).where(_mine(parcel)).values(values))

    def record_failure(self, parcel: ClaimedDelivery, error: str, delay_seconds: float | None) -> None:
        """It has not arrived: try again after that delay, or give up where there is none."""
        again = {"status": "pending", "next_attempt_at": now() + (delay_seconds or 0.0)}
        values = {"status": "failed", "ended_at": now()} if delay_seconds is None else again
        with writing(self._engine) as session:
            session.execute(update(Delivery).where(_mine(parcel)).values({**values, "last_error": error}))

    def record_gone(self, parcel: ClaimedDelivery) -> None:
        """The receiver wants no more: switch its webhook off, unless it has moved to another address meanwhile."""
        same = select(Webhook).where(Webhook.id == parcel.webhook_id, Webhook.url == parcel.url)
        with writing(self._engine) as session:
            if session.scalars(same.with_for_update()).one_or_none() is not None:
                switch_off(session, parcel.webhook_id, "gone")
            values = {"status": "failed", "ended_at": now(), "last_error": "http_410"}
            session.execute(update(Delivery).where(Delivery.id == parcel.delivery_id).values(values))

    def purge(self, seconds: float, batch: int = 500) -> int:
        """Forget a batch of deliveries that ended so long ago. How many."""
        old = select(Delivery.id).where(Delivery.ended_at < now() - seconds)
        with writing(self._engine) as session:
            ids = session.scalars(old.limit(batch).with_for_update(skip_locked=True)).all()
            session.execute(delete(Delivery).where(Delivery.id.in_(ids)))
            return len(ids)


def _due() -> ColumnElement[bool]:
    return and_(Delivery.status.in_(("pending", "sending")), Delivery.next_attempt_at <= now())


def _mine(parcel: ClaimedDelivery) -> ColumnElement[bool]:
    """The delivery, unless another process has claimed it since, or it was dropped."""
    return and_(Delivery.id == parcel.delivery_id, Delivery.attempt == parcel.attempt, Delivery.status == "sending")


def _counted_sending() -> Select[str]:
    busy = (Delivery.status == "sending", Delivery.next_attempt_at > now())
    return select(Delivery.webhook_id).where(*busy).group_by(Delivery.webhook_id)


def _open_webhook(session: Session, which: Select[str]) -> Webhook | None:
    """The webhook, where it is on. Locked: its claims are counted one by one, while events go on to come."""
    query = select(Webhook).where(Webhook.id.in_(which), Webhook.enabled)
    return session.scalars(query.with_for_update(key_share=True)).one_or_none()


def _claim(session: Session, webhook: Webhook, delivery_id: str, seconds: float) -> ClaimedDelivery | None:
    full = _counted_sending().having(func.count() >= AT_ONCE)
    may = (Delivery.id == delivery_id, _due(), Delivery.webhook_id.not_in(full))
    values = {"status": "sending", "attempt": Delivery.attempt + 1, "next_attempt_at": now() + seconds}
    taken = update(Delivery).where(*may).values(values).execution_options(synchronize_session=False)
    row = session.scalars(taken.returning(Delivery)).one_or_none()
    if row is None:
        return None
    old = case((Webhook.old_secret_until > now(), Webhook.old_secret), else_=None)
    query = select(old, now() - row.created_at).where(Webhook.id == webhook.id)
    old_secret, age = session.execute(query).one()
    return ClaimedDelivery(
        delivery_id=row.id,
        webhook_id=webhook.id,
        url=webhook.url,
        secrets=tuple(s for s in (webhook.secret, old_secret) if s),
        event_id=row.event_id,
        type=row.type,
        object_id=row.object_id,
        created_at=row.created_at,
        attempt=row.attempt,
        age=age,
    )
