"""Schemas of webhooks and deliveries."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.paging import Page
from tpo.webhooks.tables import DEFAULT_EVENTS, DeliveryStatus, EventType
from tpo.wire import Identified, Wire

_Url = Annotated[str, Field(max_length=2048, description="https://… or http://…, of the public Internet")]
_Events = Annotated[
    list[EventType], Field(min_length=1, max_length=50, fail_fast=True, description="which events to tell of")
]


class WebhookRequest(Wire):
    """A webhook to make."""

    url: _Url
    events: _Events = Field(default_factory=lambda: list(DEFAULT_EVENTS))


class WebhookUpdate(Wire):
    """What to change; the rest stays."""

    url: _Url | None = None
    events: _Events | None = None
    enabled: bool | None = Field(None, description="false: nothing is sent or kept for later; true: from now on")


class Rotate(Wire):
    """How to change the secret."""

    keep_old_seconds: int = Field(
        86_400, ge=0, le=604_800, description="how long the old secret signs beside the new one"
    )


class Webhook(Identified):
    """A webhook. Its secret is never shown again."""

    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    enabled: bool
    disabled_reason: str | None = Field(description="`gone`: it answered 410; `by_owner`")
    old_secret_until: int | None = Field(description="until when the secret that was replaced signs too")
    created_at: int


class WebhookWithSecret(Webhook):
    """A webhook and its new secret: keep it, for it is shown this once."""

    secret: str


class WebhookDeleted(Wire):
    """A webhook is forgotten."""

    id: str
    object: Literal["webhook"] = "webhook"
    deleted: Literal[True] = True


class Delivery(Identified):
    """One event on its way to one webhook."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    event_id: str = Field(description="the header webhook-id, the same at every attempt")
    type: str
    data_id: str
    status: DeliveryStatus
    attempt: int
    created_at: int
    next_attempt_at: int | None
    last_error: str | None = Field(description="why the last attempt failed: http_500, timeout, private_address …")


class WebhookPage(Page[Webhook]):
    """Webhooks, the newest first."""


class DeliveryPage(Page[Delivery]):
    """Deliveries, the newest first."""


def without_duplicates(events: list[EventType]) -> list[EventType]:
    return list(dict.fromkeys(events))
