"""Idempotency: identify a request, so that a retry does not repeat its effect."""

import hashlib
import json
import re
from typing import Any

from fastapi import Request

from tpo.core.errors import InvalidInputError
from tpo.settings import Settings
from tpo.tenants.idempotency import IdempotencyRequest

REPLAYED = {"idempotent-replayed": "true"}
"""Header of the response to a duplicate request."""

_KEY = re.compile(r"[\x20-\x7e]{1,255}")


def idempotency_request(request: Request, settings: Settings, body: Any) -> IdempotencyRequest:
    """Return the identity of a request: its Idempotency-Key, and a hash of its path and body.

    Raises InvalidInputError.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInputError("Idempotency-Key: must be 1 to 255 printable ASCII characters.", "Idempotency-Key")
    whole = json.dumps([request.url.path, body], sort_keys=True, allow_nan=False)
    fingerprint = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
    return IdempotencyRequest(fingerprint, key, settings.idempotency_hours * 3600)
