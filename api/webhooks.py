"""Webhooks: where to tell of what has ended."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from api.answers import INVALID, SWITCHED_OFF, TOO_MANY_WEBHOOKS, UNAVAILABLE, UNREADABLE, WEBHOOK_NOT_FOUND
from api.deps import NoQuery, SettingsDep, StoreDep, sane_id
from api.paging import Page, PageQuery
from tpo.addresses import check_url
from tpo.errors import WebhookNotFound
from tpo.jobs import webhook_tables as tables
from tpo.jobs.webhook_tables import DEFAULT_EVENTS, DeliveryStatus, EventType
from tpo.submission import Identified, Wire

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses={**INVALID, **UNAVAILABLE})

_Url = Annotated[str, Field(max_length=2048, description="https://… or http://…, of the public Internet")]
_Events = Annotated[list[EventType], Field(min_length=1, max_length=50, description="which events to tell of")]


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


def _webhook_id(webhook_id: str) -> str:
    return sane_id(webhook_id, WebhookNotFound("There is no webhook with this id."))


WebhookId = Annotated[str, Depends(_webhook_id)]


@router.post("", status_code=201, dependencies=[NoQuery], responses={**UNREADABLE, **TOO_MANY_WEBHOOKS})
def create(body: WebhookRequest, store: StoreDep, settings: SettingsDep) -> WebhookWithSecret:
    """Make a webhook. The answer alone shows its `secret`."""
    check_url(body.url, allow_private=settings.webhook_allow_private)
    made = store.create_webhook(body.url, _unique(body.events))
    return WebhookWithSecret(**_view(made.row).model_dump(), secret=made.secret)


@router.get("")
def page(query: PageQuery, store: StoreDep) -> WebhookPage:
    """List webhooks, the newest first."""
    rows = store.webhooks_page(limit=query.limit + 1, after=query.after)
    return WebhookPage.of(rows, query.limit, _view)


@router.get("/{webhook_id}", dependencies=[NoQuery], responses=WEBHOOK_NOT_FOUND)
def retrieve(webhook_id: WebhookId, store: StoreDep) -> Webhook:
    """One webhook."""
    return _view(store.webhook(webhook_id))


@router.patch("/{webhook_id}", dependencies=[NoQuery], responses={**UNREADABLE, **WEBHOOK_NOT_FOUND})
def change(webhook_id: WebhookId, body: WebhookUpdate, store: StoreDep, settings: SettingsDep) -> Webhook:
    """Change a webhook. Its secret stays."""
    changes = body.model_dump(exclude_none=True)
    if body.url is not None:
        check_url(body.url, allow_private=settings.webhook_allow_private)
    if body.events is not None:
        changes["events"] = _unique(body.events)
    return _view(store.update_webhook(webhook_id, changes))


@router.post("/{webhook_id}/rotate-secret", dependencies=[NoQuery], responses={**UNREADABLE, **WEBHOOK_NOT_FOUND})
def rotate(webhook_id: WebhookId, store: StoreDep, body: Rotate | None = None) -> WebhookWithSecret:
    """Make a new secret. For a day, or as long as is asked, the old one signs too."""
    made = store.rotate_secret(webhook_id, (body or Rotate()).keep_old_seconds)
    return WebhookWithSecret(**_view(made.row).model_dump(), secret=made.secret)


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    dependencies=[NoQuery],
    responses={**WEBHOOK_NOT_FOUND, **SWITCHED_OFF},
)
def test(webhook_id: WebhookId, store: StoreDep) -> Delivery:
    """Have an event `webhook.test` delivered."""
    return _delivery(store.ping_webhook(webhook_id))


@router.get("/{webhook_id}/deliveries", responses=WEBHOOK_NOT_FOUND)
def deliveries(webhook_id: WebhookId, query: PageQuery, store: StoreDep) -> DeliveryPage:
    """What was, or has to be, delivered, the newest first. What has ended is kept for a week."""
    rows = store.deliveries_page(webhook_id, limit=query.limit + 1, after=query.after)
    return DeliveryPage.of(rows, query.limit, _delivery)


@router.delete("/{webhook_id}", dependencies=[NoQuery], responses=WEBHOOK_NOT_FOUND)
def delete(webhook_id: WebhookId, store: StoreDep) -> WebhookDeleted:
    """Forget a webhook, and what waits for it."""
    store.delete_webhook(webhook_id)
    return WebhookDeleted(id=webhook_id)


def _unique(events: list[EventType]) -> list[EventType]:
    return list(dict.fromkeys(events))


def _view(row: tables.Webhook) -> Webhook:
    return Webhook(
        id=row.id,
        url=row.url,
        events=row.events,
        enabled=row.enabled,
        disabled_reason=row.disabled_reason,
        old_secret_until=None if row.old_secret_until is None else int(row.old_secret_until),
        created_at=int(row.created_at),
    )


def _delivery(row: tables.Delivery) -> Delivery:
    return Delivery(
        id=row.id,
        event_id=row.event_id,
        type=row.type,
        data_id=row.object_id,
        status=row.status,
        attempt=row.attempt,
        created_at=int(row.created_at),
        next_attempt_at=int(row.next_attempt_at) if row.status == "pending" else None,
        last_error=row.last_error,
    )
