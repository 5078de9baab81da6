"""Routes of webhooks."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.bodies import RotateBody, WebhookBody, WebhookUpdateBody
from api.dependencies import NoQuery, SettingsDep, StoreDep, printable_id
from api.openapi.errors import DISABLED, INVALID, TOO_MANY_WEBHOOKS_EXIST, UNAVAILABLE, UNREADABLE, WEBHOOK_NOT_FOUND
from api.schemas.paging import PageQuery
from api.schemas.webhooks import (
    Delivery,
    DeliveryPage,
    Rotate,
    Webhook,
    WebhookDeleted,
    WebhookPage,
    WebhookWithSecret,
    without_duplicates,
)
from tpo.core.errors import WebhookNotFoundError
from tpo.webhooks import tables
from tpo.webhooks.addresses import AllowedTargets, check_url

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses={**INVALID, **UNAVAILABLE})


def _webhook_id(webhook_id: str) -> str:
    return printable_id(webhook_id, WebhookNotFoundError())


WebhookId = Annotated[str, Depends(_webhook_id)]


@router.post("", status_code=201, dependencies=[NoQuery], responses={**UNREADABLE, **TOO_MANY_WEBHOOKS_EXIST})
def create_webhook(body: WebhookBody, store: StoreDep, settings: SettingsDep) -> WebhookWithSecret:
    """Create a webhook. Only this response shows its `secret`."""
    check_url(body.url, AllowedTargets.from_settings(settings))
    made = store.webhooks.create(body.url, without_duplicates(body.events))
    return WebhookWithSecret(**_view(made.row).model_dump(), secret=made.secret)


@router.get("")
def list_webhooks(query: PageQuery, store: StoreDep) -> WebhookPage:
    """List webhooks, the newest first."""
    rows = store.webhooks.page(limit=query.limit + 1, after=query.after)
    return WebhookPage.of(rows, query.limit, _view)


@router.get("/{webhook_id}", dependencies=[NoQuery], responses=WEBHOOK_NOT_FOUND)
def get_webhook(webhook_id: WebhookId, store: StoreDep) -> Webhook:
    """Get a webhook."""
    return _view(store.webhooks.get(webhook_id))


@router.patch("/{webhook_id}", dependencies=[NoQuery], responses={**UNREADABLE, **WEBHOOK_NOT_FOUND})
def update_webhook(webhook_id: WebhookId, body: WebhookUpdateBody, store: StoreDep, settings: SettingsDep) -> Webhook:
    """Update a webhook. Its secret is not changed."""
    changes = body.model_dump(exclude_none=True)
    if body.url is not None:
        check_url(body.url, AllowedTargets.from_settings(settings))
    if body.events is not None:
        changes["events"] = without_duplicates(body.events)
    return _view(store.webhooks.update(webhook_id, changes))


@router.post("/{webhook_id}/rotate-secret", dependencies=[NoQuery], responses={**UNREADABLE, **WEBHOOK_NOT_FOUND})
def rotate_webhook_secret(webhook_id: WebhookId, store: StoreDep, body: RotateBody) -> WebhookWithSecret:
    """Rotate the secret of a webhook. The old secret stays valid for a day, or for the requested time."""
    made = store.webhooks.rotate_secret(webhook_id, (body or Rotate()).keep_old_seconds)
    return WebhookWithSecret(**_view(made.row).model_dump(), secret=made.secret)


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    dependencies=[NoQuery],
    responses={**WEBHOOK_NOT_FOUND, **DISABLED},
)
def test_webhook(webhook_id: WebhookId, store: StoreDep) -> Delivery:
    """Send a test event (`webhook.test`) to a webhook."""
    return _delivery(store.webhooks.ping(webhook_id))


@router.get("/{webhook_id}/deliveries", responses=WEBHOOK_NOT_FOUND)
def list_webhook_deliveries(webhook_id: WebhookId, query: PageQuery, store: StoreDep) -> DeliveryPage:
    """List the deliveries of a webhook, the newest first. Finished deliveries are kept for a week."""
    rows = store.webhooks.deliveries_page(webhook_id, limit=query.limit + 1, after=query.after)
    return DeliveryPage.of(rows, query.limit, _delivery)


@router.delete("/{webhook_id}", dependencies=[NoQuery], responses=WEBHOOK_NOT_FOUND)
def delete_webhook(webhook_id: WebhookId, store: StoreDep) -> WebhookDeleted:
    """Delete a webhook and its pending deliveries."""
    store.webhooks.delete(webhook_id)
    return WebhookDeleted(id=webhook_id)


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
