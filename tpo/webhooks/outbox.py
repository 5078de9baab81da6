"""Transactional outbox: deliveries are inserted in the transaction that causes their events, so none is lost."""

import secrets

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from tpo.db import new_id, now
from tpo.webhooks.tables import Delivery, Webhook


def enqueue_webhooks(session: Session, tenant: str, events: dict[str, str]) -> None:
    """Insert a delivery for each event that an enabled webhook of the tenant subscribes to.

    `events` are the ids of objects by event type.
    """
    # Lock only against deletion: a job must be able to end although a webhook is deleted at the same moment.
    enabled = select(Webhook).where(Webhook.tenant == tenant, Webhook.enabled)
    for webhook in session.scalars(enabled.with_for_update(read=True, key_share=True)).all():
        for event_type, object_id in events.items():
            if event_type in webhook.events:
                insert_delivery(session, webhook.id, event_type, object_id)


def insert_delivery(session: Session, webhook_id: str, event_type: str, object_id: str) -> str:
    """Insert the delivery of an event to a webhook. Returns the delivery's id, which sorts by time."""
    seconds = session.execute(select(now())).scalar_one()
    delivery_id = new_id("whd_", seconds)
    session.execute(
        insert(Delivery).values(
            id=delivery_id,
            webhook_id=webhook_id,
            event_id=f"evt_{secrets.token_hex(16)}",
            type=event_type,
            object_id=object_id,
            created_at=now(),
            status="pending",
            attempt=0,
            next_attempt_at=now(),
        )
    )
    return delivery_id
