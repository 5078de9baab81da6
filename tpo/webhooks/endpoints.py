"""Queries of the webhooks of one tenant."""

import base64
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from tpo.core.errors import ConflictError, WebhookNotFoundError
from tpo.db import Queries, new_id, now, reading, writing
from tpo.webhooks.outbox import insert_delivery
from tpo.webhooks.tables import PING, Delivery, Webhook

MAX_WEBHOOKS = 20
"""Maximum number of webhooks of one tenant: each adds a delivery to every job."""

_SECRET_BYTES = 32

TOO_MANY_WEBHOOKS = f"There are already {MAX_WEBHOOKS} webhooks, the maximum. Delete one first."
WEBHOOK_DISABLED = "The webhook is disabled. Enable it first."


class NewSecret(NamedTuple):
    """A webhook and its new secret, which is readable only now."""

    row: Webhook
    secret: str


class WebhookQueries(Queries):
    """The part of the store that manages webhooks."""

    def create(self, url: str, events: Sequence[str]) -> NewSecret:
        """Create a webhook. Raises ConflictError if the tenant has MAX_WEBHOOKS already."""
        secret = _new_secret()
        with writing(self._engine) as session:
            count = select(func.count()).select_from(Webhook).where(Webhook.tenant == self.tenant)
            if session.execute(count).scalar_one() >= MAX_WEBHOOKS:
                raise ConflictError(TOO_MANY_WEBHOOKS)
            seconds = session.execute(select(now())).scalar_one()
            webhook_id = new_id("wh_", seconds)
            session.execute(
                insert(Webhook).values(
                    id=webhook_id,
                    tenant=self.tenant,
                    url=url,
                    events=list(events),
                    enabled=True,
                    secret=secret,
                    created_at=now(),
                )
            )
            return NewSecret(session.get_one(Webhook, webhook_id), secret)

    def get(self, webhook_id: str) -> Webhook:
        """Return a webhook. Raises WebhookNotFoundError."""
        with reading(self._engine) as session:
            return self._own_webhook(session, webhook_id)

    def page(self, *, limit: int, after: str | None = None) -> Sequence[Webhook]:
        """Return a page of webhooks, newest first. `after` is the last id of the previous page."""
        query = select(Webhook).where(Webhook.tenant == self.tenant)
        if after is not None:
            query = query.where(Webhook.id < after)
        with reading(self._engine) as session:
            return session.scalars(query.order_by(Webhook.id.desc()).limit(limit)).all()

    def update(self, webhook_id: str, changes: dict[str, Any]) -> Webhook:
        """Change `url`, `events` or `enabled`. Pending deliveries of a webhook that is disabled are dropped."""
        with writing(self._engine) as session:
            webhook = self._own_webhook(session, webhook_id, lock=True)
            if changes.get("enabled") is True:
                changes = {**changes, "disabled_reason": None}
            if changes.get("enabled") is False:
                disable_webhook(session, webhook_id, "by_owner")
            if changes:
                session.execute(update(Webhook).where(Webhook.id == webhook_id).values(changes))
            session.refresh(webhook)
            return webhook

    def rotate_secret(self, webhook_id: str, keep_old_seconds: float) -> NewSecret:
        """Create a new secret. The old one signs as well for `keep_old_seconds`. Raises WebhookNotFoundError."""
        secret = _new_secret()
        with writing(self._engine) as session:
            webhook = self._own_webhook(session, webhook_id, lock=True)
            values: dict[str, Any] = {
                "secret": secret,
                "old_secret": webhook.secret,
                "old_secret_until": now() + keep_old_seconds,
            }
            if not keep_old_seconds:
                values |= {"old_secret": None, "old_secret_until": None}
            session.execute(update(Webhook).where(Webhook.id == webhook_id).values(values))
            session.refresh(webhook)
            return NewSecret(webhook, secret)

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook and its deliveries. Raises WebhookNotFoundError."""
        with writing(self._engine) as session:
            self._own_webhook(session, webhook_id, lock=True)
            session.execute(delete(Webhook).where(Webhook.id == webhook_id))

    def ping(self, webhook_id: str) -> Delivery:
        """Enqueue a test event. Raises WebhookNotFoundError, and ConflictError if the webhook is disabled."""
        with writing(self._engine) as session:
            if not self._own_webhook(session, webhook_id, lock=True).enabled:
                raise ConflictError(WEBHOOK_DISABLED)
            return session.get_one(Delivery, insert_delivery(session, webhook_id, PING, webhook_id))

    def deliveries_page(self, webhook_id: str, *, limit: int, after: str | None = None) -> Sequence[Delivery]:
        """Return a page of a webhook's deliveries, newest first. Raises WebhookNotFoundError."""
        query = select(Delivery).where(Delivery.webhook_id == webhook_id)
        if after is not None:
            query = query.where(Delivery.id < after)
        with reading(self._engine) as session:
            self._own_webhook(session, webhook_id)
            return session.scalars(query.order_by(Delivery.id.desc()).limit(limit)).all()

    def _own_webhook(self, session: Session, webhook_id: str, *, lock: bool = False) -> Webhook:
        query = select(Webhook).where(Webhook.id == webhook_id, Webhook.tenant == self.tenant)
        found = session.scalars(query.with_for_update() if lock else query).one_or_none()
        if found is None:
            raise WebhookNotFoundError(f"There is no webhook {webhook_id!r}.")
        return found


def disable_webhook(session: Session, webhook_id: str, reason: str) -> None:
    """Disable a webhook and drop its pending deliveries."""
    # The webhook's row is locked first, as everywhere: another order could deadlock.
    disabled = update(Webhook).where(Webhook.id == webhook_id)
    session.execute(disabled.values(enabled=False, disabled_reason=reason))
    pending = update(Delivery).where(Delivery.webhook_id == webhook_id, Delivery.status.in_(("pending", "sending")))
    session.execute(pending.values(status="failed", last_error="webhook_off", ended_at=now()))


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
