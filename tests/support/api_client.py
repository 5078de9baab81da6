"""An in-process API client for tests, and the assertion that every error response must pass."""

import contextlib
from collections.abc import Iterator
from typing import Any

from fastapi.testclient import TestClient

from api.app import create_app
from tpo.settings import Settings

KEY = "a-key-that-is-long-enough"
UNKNOWN_ID = "job_" + "0" * 32


@contextlib.contextmanager
def api_client(**settings: Any) -> Iterator[TestClient]:
    """Yield a client of an API that serves the scripted models."""
    values = {
        "policy": "scripted",
        "reward_model": "scripted",
        "max_input_characters": 1000,
        "allowed_hosts": "testserver",
        **settings,
    }
    with TestClient(create_app(Settings(**values))) as client:
        yield client


def assert_problem(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Assert that an error response has both error formats with equal content, and return its body.

    The formats are RFC 9457 problem details and the `error` object of the OpenAI API.
    """
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert set(body) - {"checks"} == {"type", "title", "status", "detail", "instance", "error"}
    assert body["error"]["message"] == body["detail"]
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert (response.headers.get("retry-after") is not None) == (status == 503)
    return body


def submit(client: TestClient, **body: Any) -> dict[str, Any]:
    """Submit a job and return it."""
    response = client.post("/v1/jobs", json={"input": "Hello", **body})
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job
