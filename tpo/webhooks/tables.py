"""Webhooks and their deliveries as typed models."""

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
"""A response is a job by another name: it is told of only to those who ask for that name."""

PING = "webhook.test"


class Webhook(Base):
    """Where a tenant wants to be told of what has ended, and the secrets that sign it."""

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
    """Signs beside the new one until `old_secret_until`."""
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]


class Delivery(Base):
    """One event on its way to one webhook."""

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
    """The same at every attempt: a receiver tells by it what it has seen."""
    type: Mapped[str] = mapped_column(String(40))
    object_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    status: Mapped[DeliveryStatus] = mapped_column(String(16), default="pending")
    attempt: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float]
    """While it is sent: when it counts as lost with its sender."""
    ended_at: Mapped[float | None]
    last_error: Mapped[str | None]
    """A code alone: nothing that the receiver said."""
