"""Queries of the webhook sender. A delivery is claimed before it is sent, and sent again if its sender died."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Select, and_, case, delete, func, select, update
from sqlalchemy.orm import Session

from tpo.db import Queries, now, reading, writing
from tpo.webhooks.endpoints import disable_webhook
from tpo.webhooks.tables import Delivery, Webhook

MAX_SENDING_PER_WEBHOOK = 4
"""Maximum number of deliveries sent to one webhook at the same time, so that a slow one leaves slots to others."""


@dataclass(frozen=True)
class ClaimedDelivery:
    """A delivery that this process has claimed: the event, its destination and the secrets that sign it."""

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
    """The part of the store that claims and records deliveries, for all tenants."""

    def due(self, limit: int) -> Sequence[str]:
        """Return ids of due deliveries to notify senders of. Those due the longest of each webhook come first."""
        busy = _counted_sending().having(func.count() >= MAX_SENDING_PER_WEBHOOK)
        place = func.row_number().over(partition_by=Delivery.webhook_id, order_by=Delivery.next_attempt_at)
        due = select(Delivery.id, place.label("place")).where(_due(), Delivery.webhook_id.not_in(busy)).subquery()
        query = select(due.c.id).where(due.c.place <= MAX_SENDING_PER_WEBHOOK).order_by(due.c.place).limit(limit)
        with reading(self._engine) as session:
            return session.scalars(query).all()

    def claim(self, delivery_id: str, seconds: float) -> ClaimedDelivery | None:
        """Claim a delivery for a number of seconds.

        Returns None if it is not due, or if its webhook is disabled or has too many deliveries being sent.
        """
        with writing(self._engine) as session:
            webhook = _enabled_webhook(session, select(Delivery.webhook_id).where(Delivery.id == delivery_id))
            return _claim(session, webhook, delivery_id, seconds) if webhook else None

    def claim_next(self, webhook_id: str, seconds: float) -> ClaimedDelivery | None:
        """Claim the delivery of a webhook that has been due the longest, or return None."""
        query = select(Delivery.id).where(Delivery.webhook_id == webhook_id, _due())
        with writing(self._engine) as session:
            webhook = _enabled_webhook(session, select(Webhook.id).where(Webhook.id == webhook_id))
            found = session.scalars(query.order_by(Delivery.next_attempt_at).limit(1)).one_or_none()
            return _claim(session, webhook, found, seconds) if webhook and found else None

    def record_success(self, delivery: ClaimedDelivery) -> None:
        """Record that a delivery has arrived."""
        with writing(self._engine) as session:
            values = {"status": "delivered", "ended_at": now(), "last_error": None}
            session.execute(update(Delivery).where(_claimed(delivery)).values(values))

    def record_failure(self, delivery: ClaimedDelivery, error: str, delay_seconds: float | None) -> None:
        """Record a failed attempt. The next one is due after the delay; without a delay, the delivery is given up."""
        retry = {"status": "pending", "next_attempt_at": now() + (delay_seconds or 0.0)}
        values = {"status": "failed", "ended_at": now()} if delay_seconds is None else retry
        with writing(self._engine) as session:
            session.execute(update(Delivery).where(_claimed(delivery)).values({**values, "last_error": error}))

    def record_gone(self, delivery: ClaimedDelivery) -> None:
        """Record that the receiver is gone (410): disable its webhook, unless its URL has changed since the claim."""
        same_url = select(Webhook).where(Webhook.id == delivery.webhook_id, Webhook.url == delivery.url)
        with writing(self._engine) as session:
            if session.scalars(same_url.with_for_update()).one_or_none() is not None:
                disable_webhook(session, delivery.webhook_id, "gone")
            values = {"status": "failed", "ended_at": now(), "last_error": "http_410"}
            session.execute(update(Delivery).where(Delivery.id == delivery.delivery_id).values(values))

    def purge(self, seconds: float, batch: int = 500) -> int:
        """Delete a batch of deliveries that ended more than `seconds` ago. Returns their number."""
        old = select(Delivery.id).where(Delivery.ended_at < now() - seconds)
        with writing(self._engine) as session:
            ids = session.scalars(old.limit(batch).with_for_update(skip_locked=True)).all()
            session.execute(delete(Delivery).where(Delivery.id.in_(ids)))
            return len(ids)


def _due() -> ColumnElement[bool]:
    return and_(Delivery.status.in_(("pending", "sending")), Delivery.next_attempt_at <= now())


def _claimed(delivery: ClaimedDelivery) -> ColumnElement[bool]:
    """Match the delivery, unless another process has claimed it since, or it has ended."""
    return and_(Delivery.id == delivery.delivery_id, Delivery.attempt == delivery.attempt, Delivery.status == "sending")


def _counted_sending() -> Select[str]:
    sending = (Delivery.status == "sending", Delivery.next_attempt_at > now())
    return select(Delivery.webhook_id).where(*sending).group_by(Delivery.webhook_id)


def _enabled_webhook(session: Session, which: Select[str]) -> Webhook | None:
    """Lock and return the webhook if it is enabled.

    The lock serialises the claims that count its deliveries. It does not block new deliveries.
    """
    query = select(Webhook).where(Webhook.id.in_(which), Webhook.enabled)
    return session.scalars(query.with_for_update(key_share=True)).one_or_none()


def _claim(session: Session, webhook: Webhook, delivery_id: str, seconds: float) -> ClaimedDelivery | None:
    busy = _counted_sending().having(func.count() >= MAX_SENDING_PER_WEBHOOK)
    claimable = (Delivery.id == delivery_id, _due(), Delivery.webhook_id.not_in(busy))
    values = {"status": "sending", "attempt": Delivery.attempt + 1, "next_attempt_at": now() + seconds}
    claim = update(Delivery).where(*claimable).values(values).execution_options(synchronize_session=False)
    row = session.scalars(claim.returning(Delivery)).one_or_none()
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
