"""The client's rules beside a server that a test makes up: what is tried again, and where a stream goes on."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tpo.client import Client
from tpo.client.errors import APIError, InternalServerError, NotFoundError

Answer = Callable[[httpx.Request], httpx.Response]


class Made(Client):
    """A client whose server is a function. It remembers what it was asked."""

    def __init__(self, answer: Answer, retries: int = 5) -> None:
        super().__init__("http://test", retries=retries)
        self.asked: list[httpx.Request] = []

        def remembered(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            return answer(request)

        self._transport._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(remembered))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that nobody has to wait for."""
    made: list[float] = []
    monkeypatch.setattr("tpo.client.transport.time", SimpleNamespace(sleep=made.append))
    return made


def stream(*events: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, text="".join(f"data: {json.dumps(event)}\n\n" for event in events))


def closed(reason: str) -> dict[str, Any]:
    return {"type": "stream.closed", "reason": reason}


def test_events_resume_stream_closed_early_after_job_ended() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"status": "completed"})
        number = int(request.headers["last-event-id"]) + 1
        event = {"type": "job.phase" if number < 9 else "job.completed", "sequence_number": number}
        return stream(event, closed("slow_listener"))

    # More ends than tries: each event begins their count anew.
    assert [e["sequence_number"] for e in Made(answer, retries=1).events("job_1")] == list(range(1, 10))


def test_events_end_after_last_and_raise_for_deleted_job() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return stream() if request.url.path.endswith("/events") else httpx.Response(200, json={"status": "failed"})

    assert list(Made(answer).events("job_1", starting_after=7)) == []
    client = Made(lambda _: stream(closed("job_deleted")))
    with pytest.raises(NotFoundError, match="deleted"):
        list(client.events("job_1"))
    assert len(client.asked) == 1


@pytest.mark.parametrize(
    ("status", "headers", "asked"),
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
    status: int, headers: dict[str, str], asked: int, pauses: list[float]
) -> None:
    client = Made(lambda _: httpx.Response(status, headers=headers, json={"detail": "no"}), retries=2)
    with pytest.raises(APIError, match="no"):
        client.get("job_1")
    assert len(client.asked) == asked
    assert len(pauses) == asked - 1
    assert all(pause > float(headers.get("retry-after", 0)) for pause in pauses)


def test_delete_treats_not_found_on_retry_as_success() -> None:
    answers = iter([httpx.Response(503), httpx.Response(404)])
    Made(lambda _: next(answers)).delete("job_1")
    with pytest.raises(NotFoundError):
        Made(lambda _: httpx.Response(404)).delete("job_1")
    with pytest.raises(InternalServerError):
        Made(lambda _: httpx.Response(500), retries=0).delete("job_1")


def test_submit_merges_fields_and_reuses_idempotency_key() -> None:
    answers = iter([httpx.Response(500), httpx.Response(202, json={"id": "job_1"})])
    client = Made(lambda _: next(answers))
    client.submit({"input": "Why?", "priority": 5}, priority=1, external_id="mine")
    first, second = client.asked
    assert json.loads(second.content) == {"input": "Why?", "priority": 5, "external_id": "mine"}
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_list_stops_at_limit_across_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        begin = int(request.url.params.get("after", 0))
        data = [{"id": str(begin + i + 1)} for i in range(int(request.url.params["limit"]))]
        return httpx.Response(200, json={"data": data, "has_more": begin < 1000, "last_id": data[-1]["id"]})

    client = Made(answer)
    assert [job["id"] for job in client.list(limit=250)] == [str(i + 1) for i in range(250)]
    assert [request.url.params["limit"] for request in client.asked] == ["100", "100", "50"]
