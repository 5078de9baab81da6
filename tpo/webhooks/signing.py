"""Payloads and signatures of webhooks (Standard Webhooks)."""

import base64
import hashlib
import hmac
import json

from tpo.webhooks.deliveries import ClaimedDelivery


def payload(parcel: ClaimedDelivery) -> bytes:
    """The body: thin, for texts are fetched with a key. The same at every attempt."""
    event = {
        "id": parcel.event_id,
        "object": "event",
        "type": parcel.type,
        "created_at": int(parcel.created_at),
        "data": {"id": parcel.object_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def signed(event_id: str, timestamp: int, body: bytes, secrets: tuple[str, ...]) -> dict[str, str]:
    """The headers that prove who sent it, with a signature for each secret that is valid."""
    content = f"{event_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(base64.b64decode(s.removeprefix("whsec_")), content, hashlib.sha256) for s in secrets)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join("v1," + base64.b64encode(digest).decode() for digest in digests),
    }
