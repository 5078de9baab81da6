"""Fingerprints of requests: equal for the same path and the same body, in any order of fields."""

from typing import Any

from starlette.requests import Request

from api.idempotency import idempotency_request
from tpo.settings import Settings


def fingerprint(path: str, body: Any) -> str:
    """Return the fingerprint of a POST request."""
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "server": ("here", 80)}
    return idempotency_request(
        Request({**scope, "headers": [(b"idempotency-key", b"key")]}), Settings(), body
    ).fingerprint


def test_fingerprint_ignores_field_order_but_not_path() -> None:
    body = {"input": "Why?", "parameters": {"seed": 1, "sample_size": 2}}
    same = {"parameters": {"sample_size": 2, "seed": 1}, "input": "Why?"}
    assert fingerprint("/v1/jobs", body) == fingerprint("/v1/jobs", same)
    assert fingerprint("/v1/jobs", body) != fingerprint("/v1/jobs", {**same, "input": "How?"})
    assert fingerprint("/v1/jobs/job_1/retry", None) != fingerprint("/v1/jobs/job_2/retry", None)
