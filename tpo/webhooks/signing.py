"""Payloads and signatures of webhooks, as Standard Webhooks (https://www.standardwebhooks.com) defines them."""

import base64
import hashlib
import hmac
import json

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
    content = f"{event_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(base64.b64decode(s.removeprefix("whsec_")), content, hashlib.sha256) for s in secrets)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join("v1," + base64.b64encode(digest).decode() for digest in digests),
    }
