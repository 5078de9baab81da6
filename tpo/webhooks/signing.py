"""Payloads and signatures of webhooks, as Standard Webhooks (https://www.standardwebhooks.com) defines them."""

import json
from datetime import UTC, datetime

from standardwebhooks import Webhook

from tpo.webhooks.deliveries import ClaimedDelivery


def payload(delivery: ClaimedDelivery) -> bytes:
    """Return the body of a delivery. It contains only ids, and is the same at every attempt."""
    event = {
        "id": delivery.event_id,
        "object": "event",
        "type": delivery.type,
        "created_at": int(delivery.created_at),
        "data": {"id": delivery.object_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def signature_headers(event_id: str, timestamp: int, body: bytes, secrets: tuple[str, ...]) -> dict[str, str]:
    """Return the headers that sign a body, with a signature for each valid secret. `timestamp` is in Unix seconds."""
    moment, text = datetime.fromtimestamp(timestamp, UTC), body.decode()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(Webhook(secret).sign(event_id, moment, text) for secret in secrets),
    }
