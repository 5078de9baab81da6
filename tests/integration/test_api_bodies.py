"""Bodies that are expensive to read: refused by their counts, and never validated on the event loop when large."""

import asyncio
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from api import bodies
from api.bodies import DOCUMENTED, INLINE_BYTES, SMALL_BODY_BYTES, JSONBody
from tests.support.api_client import UNKNOWN_ID, assert_problem
from tpo.json_limits import MAX_FIELDS, MAX_ITEMS
from tpo.wire import Wire

JSON = {"content-type": "application/json"}
BODY_ROUTES = {
    "create_job": ("POST", "/v1/jobs"),
    "extend_job": ("POST", f"/v1/jobs/{UNKNOWN_ID}/extend"),
    "create_response": ("POST", "/v1/responses"),
    "create_chat_completion": ("POST", "/v1/chat/completions"),
    "create_batch": ("POST", "/v1/batches"),
    "create_webhook": ("POST", "/v1/webhooks"),
    "update_webhook": ("PATCH", "/v1/webhooks/wh_1"),
    "rotate_webhook_secret": ("POST", "/v1/webhooks/wh_1/rotate-secret"),
}
MANY = MAX_ITEMS + 1
SHAPES: dict[str, tuple[Any, str | None]] = {
    "stop": ({"input": "x", "parameters": {"stop": [1] * MANY}}, "parameters.stop"),
    "unknown fields": ({f"{number:x}": 0 for number in range(MAX_FIELDS + 1)}, None),
    "metadata": ({"input": "x", "metadata": {f"{n:x}": 0 for n in range(MAX_FIELDS + 1)}}, "metadata"),
    "messages": ({"input": [{}] * MANY}, "input"),
    "events": ({"url": "https://example.com", "events": [1] * MANY}, "events"),
    "array": ([0] * MANY, None),
    "many small arrays": ({"input": [[0] * 100] * 200}, "input[98][99]"),
}


@pytest.fixture
def sqlite_client(sqlite_client_of: Callable[..., TestClient]) -> TestClient:
    return sqlite_client_of()


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if a body is parsed or validated."""
    read: list[str] = []
    parser = SimpleNamespace(loads=lambda _text: read.append("parsed"), JSONDecodeError=json.JSONDecodeError)
    monkeypatch.setattr(bodies, "json", parser)
    yield
    assert not read


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("operation", BODY_ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_refused_before_anything_is_read(sqlite_client: TestClient, operation: str, shape: str) -> None:
    method, path = BODY_ROUTES[operation]
    document, param = SHAPES[shape]
    response = sqlite_client.request(method, path, content=json.dumps(document), headers=JSON)
    assert_problem(response, 422, "invalid_input", param)


@pytest.mark.parametrize("model", [model for model, _ in DOCUMENTED.values()], ids=lambda model: model.__name__)
def test_lists_of_requests_stop_at_the_first_error(model: type[Wire]) -> None:
    lists = [schema for schema in _schemas(model.__pydantic_core_schema__) if schema["type"] in ("list", "tuple")]
    items = [(each.get("items_schema") or {}) for each in lists]
    for each, item in zip(lists, items, strict=True):
        accepts_anything = isinstance(item, dict) and item.get("type") == "any"
        assert each.get("fail_fast") or accepts_anything, each


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Iterate over all schemas inside a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for key, value in schema.items():
            if key != "metadata":
                yield from _schemas(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from _schemas(value)


def test_few_errors_are_collected_of_the_worst_body() -> None:
    worst = {
        "input": [{"role": 1, "content": 1, "x": 1}] * MAX_ITEMS,
        "parameters": {f"x{number}": 1 for number in range(MAX_FIELDS)},
        "metadata": dict.fromkeys(map(str, range(MAX_FIELDS)), 1),
        **{f"x{number}": 1 for number in range(MAX_FIELDS - 3)},
    }
    for model, _ in DOCUMENTED.values():
        with pytest.raises(ValidationError) as caught:
            model.model_validate(worst)
        assert caught.value.error_count() <= 4 * MAX_FIELDS


@pytest.mark.parametrize("operation", ["create_job", "create_response", "create_chat_completion"])
def test_large_body_is_validated_off_the_event_loop(
    sqlite_client_of: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    client = sqlite_client_of(max_input_characters=200_000)
    on_the_loop: list[tuple[int, bool]] = []
    parse = JSONBody.parse

    def observed(self: JSONBody, content: bytes) -> BaseModel | None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_the_loop.append((len(content), False))
        else:
            on_the_loop.append((len(content), True))
        return parse(self, content)

    monkeypatch.setattr(JSONBody, "parse", observed)
    param = {"create_job": "input", "create_response": "input"}.get(operation, "messages")
    for size in (10, INLINE_BYTES, INLINE_BYTES + 1, 190_000):
        content = b'{"x":1}'.ljust(size)
        assert_problem(
            client.post(BODY_ROUTES[operation][1], content=content, headers=JSON), 422, "invalid_input", param
        )
    assert on_the_loop == [(10, True), (INLINE_BYTES, True), (INLINE_BYTES + 1, False), (190_000, False)]


@pytest.mark.parametrize("operation", ["extend_job", "create_webhook", "update_webhook", "rotate_webhook_secret"])
@pytest.mark.parametrize("streamed", [False, True], ids=["with its length", "without"])
def test_actions_and_webhooks_take_small_bodies(sqlite_client: TestClient, operation: str, streamed: bool) -> None:
    method, path = BODY_ROUTES[operation]
    content = b'{"x":1}'.ljust(SMALL_BODY_BYTES + 1)
    pieces = (content[start : start + 4096] for start in range(0, len(content), 4096))
    response = sqlite_client.request(method, path, content=pieces if streamed else content, headers=JSON)
    assert_problem(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_largest_metadata_of_a_batch_is_read(sqlite_client: TestClient) -> None:
    metadata = {("\U0001f600" * 62) + f"{number:02}": "\U0001f600" * 512 for number in range(16)}
    body = {"input_file_id": "file-1", "endpoint": "/v1/responses", "completion_window": "24h", "metadata": metadata}
    response = sqlite_client.post("/v1/batches", content=json.dumps(body), headers=JSON)
    assert_problem(response, 404, "file_not_found")


def test_every_body_is_read_by_the_guard(sqlite_client: TestClient) -> None:
    app: Any = sqlite_client.app
    document = app.openapi()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    described = {each["operationId"] for each in operations if "requestBody" in each}
    assert described == {*DOCUMENTED, "upload_file"} == {*BODY_ROUTES, "upload_file"}
    framework = get_openapi(title="x", version="1", routes=app.routes)
    methods = [operation for each in framework["paths"].values() for operation in each.values()]
    assert {each["operationId"] for each in methods if "requestBody" in each} == {"upload_file"}


def test_query_with_too_many_parameters_is_refused(sqlite_client: TestClient) -> None:
    response = sqlite_client.get("/v1/jobs?" + "&".join(["status=x"] * 101))
    assert_problem(response, 422, "invalid_input")


def test_body_with_a_byte_order_mark_is_read(sqlite_client: TestClient) -> None:
    response = sqlite_client.post("/v1/jobs", content=b'\xef\xbb\xbf{"input": "Hello"}', headers=JSON)
    assert response.status_code == 202
