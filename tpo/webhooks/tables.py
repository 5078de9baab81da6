"""Tables of webhooks and their deliveries."""

from typing import Any, Literal, get_args

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from tpo.db import Base

DeliveryStatus = Literal["pending", "sending", "delivered", "failed"]
EventType = Literal[
    "job.completed",
    "job.failed",
    "job.cancelled",
    "job.expired",
    "job.incomplete",
    "batch.completed",
    "batch.failed",
    "batch.cancelled",
    "batch.expired",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
]
DEFAULT_EVENTS: tuple[EventType, ...] = tuple(e for e in get_args(EventType) if not e.startswith("response."))
"""Events of a webhook that names none. A response is a job under another name, so its events need a subscription."""

PING = "webhook.test"


class Webhook(Base):
    """An endpoint of a tenant that is notified when a job or a batch ends, with the secrets that sign its events."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("webhooks_by_tenant", "tenant", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    url: Mapped[str]
    events: Mapped[list[Any]]
    enabled: Mapped[bool]
    disabled_reason: Mapped[str | None]
    secret: Mapped[str]
    old_secret: Mapped[str | None]
    """Signs in addition to the new secret until `old_secret_until`."""
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]


class Delivery(Base):
    """The delivery of one event to one webhook."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("deliveries_by_time", "status", "next_attempt_at"),
        Index("deliveries_by_webhook", "webhook_id", "status", "next_attempt_at"),
        Index("deliveries_by_end", "ended_at"),
        Index("deliveries_of_webhook", "webhook_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    webhook_id: Mapped[str] = mapped_column(String(40), ForeignKey("webhooks.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(String(40))
    """The same at every attempt, so that a receiver can recognise duplicates."""
    type: Mapped[str] = mapped_column(String(40))
    object_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    status: Mapped[DeliveryStatus] = mapped_column(String(16), default="pending")
    attempt: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float]
    """When the next attempt is due. While a delivery is being sent: when its sender counts as dead."""
    ended_at: Mapped[float | None]
    last_error: Mapped[str | None]
    """An error code. It contains nothing from the receiver's response."""
