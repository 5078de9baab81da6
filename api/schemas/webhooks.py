"""Schemas of webhooks and deliveries."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.paging import Page
from tpo.webhooks.tables import DEFAULT_EVENTS, DeliveryStatus, EventType
from tpo.wire import Identified, Wire

_Url = Annotated[str, Field(max_length=2048, description="https:// or http:// URL with a public address")]
_Events = Annotated[list[EventType], Field(min_length=1, max_length=50, fail_fast=True, description="events to send")]


class WebhookRequest(Wire):
    """Request to create a webhook."""

    url: _Url
    events: _Events = Field(default_factory=lambda: list(DEFAULT_EVENTS))


class WebhookUpdate(Wire):
    """Request to update a webhook. Omitted fields are not changed."""

    url: _Url | None = None
    events: _Events | None = None
    enabled: bool | None = Field(
        None, description="false: events are neither sent nor stored; true: new events are sent"
    )


class Rotate(Wire):
    """Request to rotate a secret."""

    keep_old_seconds: int = Field(
        86_400, ge=0, le=604_800, description="seconds for which the old secret signs as well"
    )


class Webhook(Identified):
    """A webhook. Its secret is never shown again."""

    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    enabled: bool
    disabled_reason: str | None = Field(
        description="`gone`: the endpoint responded with 410; `by_owner`: disabled over the API"
    )
    old_secret_until: int | None = Field(description="end of the time in which the replaced secret signs as well")
    created_at: int


class WebhookWithSecret(Webhook):
    """A webhook and its new secret. The secret is shown only in this response."""

    secret: str


class WebhookDeleted(Wire):
    """A webhook that was deleted."""

    id: str
    object: Literal["webhook"] = "webhook"
    deleted: Literal[True] = True


class Delivery(Identified):
    """Delivery of one event to one webhook."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    event_id: str = Field(description="value of the header webhook-id, the same for every attempt")
    type: str
    data_id: str
    status: DeliveryStatus
    attempt: int
    created_at: int
    next_attempt_at: int | None
    last_error: str | None = Field(
        description="error of the last attempt, such as http_500, timeout or private_address"
    )


class WebhookPage(Page[Webhook]):
    """A page of webhooks, the newest first."""


class DeliveryPage(Page[Delivery]):
    """A page of deliveries, the newest first."""


def without_duplicates(events: list[EventType]) -> list[EventType]:
    """Return the events in their order, each only once."""
    return list(dict.fromkeys(events))
