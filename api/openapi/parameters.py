"""OpenAPI descriptions of the parameters that routes read from the request themselves."""

from typing import Any


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "identifies the request: a retry with the same key and body returns the first result",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x20-\\x7e]+$"},
)
PREFER = _header("Prefer", "`wait=N`: respond with the ended job if it ends within N seconds", {"type": "string"})
IF_NONE_MATCH = _header(
    "If-None-Match", "an `ETag`: the response is 304 while the job is unchanged", {"type": "string"}
)
LAST_EVENT_ID = _header(
    "Last-Event-ID",
    "number of the last event received; overrides `starting_after`",
    {"type": "string", "pattern": "^[0-9]{1,15}$"},
)
METADATA: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "description": "`metadata[KEY]=VALUE`: only jobs with all these pairs",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


def described(*parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route with these parameters."""
    return {"parameters": list(parameters)}
