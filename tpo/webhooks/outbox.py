"""What webhooks have to be told, written in the transaction in which it became true: nothing of it can be lost."""

import secrets

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from tpo.db import new_id, now
from tpo.webhooks.tables import Delivery, Webhook


def enqueue_webhooks(session: Session, tenant: str, happened: dict[str, str]) -> None:
    """Have the tenant's webhooks told, each of those events (type and object) that it asked for."""
    # Locked against deletion alone: the end of a job must not fail for a webhook that goes in the same moment.
    mine = select(Webhook).where(Webhook.tenant == tenant, Webhook.enabled)
    for webhook in session.scalars(mine.with_for_update(read=True, key_share=True)).all():
        for kind, object_id in happened.items():
            if kind in webhook.events:
                insert_delivery(session, webhook.id, kind, object_id)


def insert_delivery(session: Session, webhook_id: str, kind: str, object_id: str) -> str:
    """Write down one event for one webhook. Gives the delivery's id, which sorts by time."""
    seconds = session.execute(select(now())).scalar_one()
    delivery_id = new_id("whd_", seconds)
    session.execute(
        insert(Delivery).values(
            id=delivery_id,
            webhook_id=webhook_id,
            event_id=f"evt_{secrets.token_hex(16)}",
            type=kind,
            object_id=object_id,
            created_at=now(),
            status="pending",
            attempt=0,
            next_attempt_at=now(),
        )
    )
    return delivery_id
