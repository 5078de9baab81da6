"""Parameters that routes read off the request themselves, for the description of the API."""

from typing import Any


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "names this request: sent again with the same body, it gives the first job",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x20-\\x7e]+$"},
)
PREFER = _header("Prefer", "`wait=N`: answer with the ended job, if it ends within N seconds", {"type": "string"})
IF_NONE_MATCH = _header("If-None-Match", "an `ETag`: the answer is 304 while the job is as it was", {"type": "string"})
LAST_EVENT_ID = _header(
    "Last-Event-ID",
    "the number of the last event that was seen; comes before `starting_after`",
    {"type": "string", "pattern": "^[0-9]{1,15}$"},
)
METADATA: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "description": "`metadata[KEY]=VALUE`: only jobs that have all these pairs",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


def described(*parameters: dict[str, Any]) -> dict[str, Any]:
    """What a route gives as its `openapi_extra`."""
    return {"parameters": list(parameters)}
