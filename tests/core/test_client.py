"""The client with a fake server: which requests are retried, and where a stream is resumed."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tpo.client import Client
from tpo.client.errors import APIError, ClientError, InternalServerError, NotFoundError
from tpo.client.types import BODY_FIELDS
from tpo.jobs.submission import Submit, SubmitParameters

Respond = Callable[[httpx.Request], httpx.Response]


class FakeServerClient(Client):
    """A client whose server is a function. It records the requests."""

    def __init__(self, respond: Respond, retries: int = 5) -> None:
        super().__init__("http://test", retries=retries)
        self.requests: list[httpx.Request] = []

        def record(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return respond(request)

        self._transport._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(record))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the client's sleep, and return the list of the pauses that it asks for."""
    made: list[float] = []
    monkeypatch.setattr("tpo.client.transport.time", SimpleNamespace(sleep=made.append))
    return made


def stream(*events: dict[str, Any]) -> httpx.Response:
    """Return a stream of these events that ends after the last one."""
    text = "".join(f": a comment\n\ndata: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    return httpx.Response(200, content=text.encode(), headers={"content-type": "text/event-stream; charset=utf-8"})


def closed(reason: str) -> dict[str, Any]:
    """Return the event that closes a stream."""
    return {"type": "stream.closed", "reason": reason}


def test_events_resume_stream_closed_early_after_job_ended() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"status": "completed"})
        number = int(request.headers["last-event-id"]) + 1
        event = {"type": "job.phase" if number < 9 else "job.completed", "sequence_number": number}
        return stream(event, closed("slow_listener"))

    # The stream is cut more often than the client retries: each event resets the count of retries.
    assert [e["sequence_number"] for e in FakeServerClient(respond, retries=1).events("job_1")] == list(range(1, 10))


def test_event_may_contain_any_line_separator_of_unicode() -> None:
    event = {"type": "job.failed", "sequence_number": 1, "text": "a\u2028b\u2029c\x85d\x0be\x0cf"}
    assert list(FakeServerClient(lambda _: stream(event)).events("job_1")) == [event]


@pytest.mark.parametrize(("kind", "text"), [("text/html", "<html>"), ("text/event-stream", "data: <html>\n\n")])
def test_event_stream_of_another_server_is_an_error(kind: str, text: str) -> None:
    client = FakeServerClient(lambda _: httpx.Response(200, content=text.encode(), headers={"content-type": kind}))
    with pytest.raises(ClientError, match="is no TPO server"):
        list(client.events("job_1"))


def test_events_end_after_last_and_raise_for_deleted_job() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return stream() if request.url.path.endswith("/events") else httpx.Response(200, json={"status": "failed"})

    assert list(FakeServerClient(respond).events("job_1", starting_after=7)) == []
    client = FakeServerClient(lambda _: stream(closed("job_deleted")))
    with pytest.raises(NotFoundError, match="deleted"):
        list(client.events("job_1"))
    assert len(client.requests) == 1


@pytest.mark.parametrize(
    ("status", "headers", "requests"),
    [
        (503, {}, 3),
        (503, {"x-should-retry": "false"}, 1),
        (409, {}, 1),
        (409, {"x-should-retry": "true"}, 3),
        (429, {"retry-after": "120"}, 3),
        (429, {"retry-after": "121"}, 1),
    ],
)
def test_client_retries_by_status_and_headers(
    status: int, headers: dict[str, str], requests: int, pauses: list[float]
) -> None:
    client = FakeServerClient(lambda _: httpx.Response(status, headers=headers, json={"detail": "no"}), retries=2)
    with pytest.raises(APIError, match="no"):
        client.get("job_1")
    assert len(client.requests) == requests
    assert len(pauses) == requests - 1
    assert all(pause > float(headers.get("retry-after", 0)) for pause in pauses)


def test_delete_treats_not_found_on_retry_as_success() -> None:
    responses = iter([httpx.Response(503), httpx.Response(404)])
    FakeServerClient(lambda _: next(responses)).delete("job_1")
    with pytest.raises(NotFoundError):
        FakeServerClient(lambda _: httpx.Response(404)).delete("job_1")
    with pytest.raises(InternalServerError):
        FakeServerClient(lambda _: httpx.Response(500), retries=0).delete("job_1")


def test_submit_merges_fields_and_reuses_idempotency_key() -> None:
    responses = iter([httpx.Response(500), httpx.Response(202, json={"id": "job_1"})])
    client = FakeServerClient(lambda _: next(responses))
    client.submit({"input": "Why?", "priority": 5}, priority=1, external_id="mine")
    first, second = client.requests
    assert json.loads(second.content) == {"input": "Why?", "priority": 5, "external_id": "mine"}
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_list_stops_at_limit_across_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params.get("after", 0))
        data = [{"id": str(start + i + 1)} for i in range(int(request.url.params["limit"]))]
        return httpx.Response(200, json={"data": data, "has_more": start < 1000, "last_id": data[-1]["id"]})

    client = FakeServerClient(respond)
    assert [job["id"] for job in client.list(limit=250)] == [str(i + 1) for i in range(250)]
    assert [request.url.params["limit"] for request in client.requests] == ["100", "100", "50"]


def sent(*words: Any, **fields: Any) -> Any:
    """Return the body that a submission sends."""
    client = FakeServerClient(lambda _: httpx.Response(202, json={}))
    client.submit(*words, **fields)
    return json.loads(client.requests[0].content)


def test_submit_takes_each_parameter_by_name() -> None:
    assert set(Submit.model_fields) == BODY_FIELDS
    for name in SubmitParameters.model_fields:
        assert sent("x", **{name: 4}) == {"input": "x", "parameters": {name: 4}}
    for name in BODY_FIELDS - {"input", "parameters"}:
        assert sent("x", **{name: 4}) == {"input": "x", name: 4}


def test_submit_prefers_the_parameters_of_a_body() -> None:
    body = {"input": "x", "parameters": {"seed": 1}}
    assert sent(body, seed=2, sample_size=3)["parameters"] == {"seed": 1, "sample_size": 3}
    assert body == {"input": "x", "parameters": {"seed": 1}}
    assert sent("x", parameters={"seed": 1}, sample_size=3)["parameters"] == {"seed": 1, "sample_size": 3}


def test_submit_refuses_a_parameter_given_twice() -> None:
    with pytest.raises(ClientError, match="seed: given by name and under parameters"):
        sent("x", seed=1, parameters={"seed": 2})


def test_batch_takes_parameters_by_name() -> None:
    job = {"id": "job_1", "status": "completed", "output": "y"}
    client = FakeServerClient(lambda _: httpx.Response(200, json=job))
    assert [result.output for result in client.batch(["x"], sample_size=4)] == ["y"]
    assert json.loads(client.requests[0].content) == {"input": "x", "parameters": {"sample_size": 4}}
