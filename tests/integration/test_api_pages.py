"""Pages of lists: bounded by bytes, with a cursor that reaches every item once, and without texts unless asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from api.schemas import paging
from testing.jobs import claim_one
from tests.support.api_client import assert_problem, submit
from tests.support.scripted_run import run_steps
from tpo.client import Client
from tpo.jobs.outcomes import Outcome
from tpo.store import Store

MakeClient = Callable[..., TestClient]
LONG = 100_000


@pytest.fixture
def long_client(make_client: MakeClient) -> TestClient:
    return make_client(max_input_characters=LONG)


Cursor = Callable[[dict[str, Any]], dict[str, Any]]


def pages(client: TestClient, path: str, cursor: Cursor, **fixed: Any) -> Iterator[dict[str, Any]]:
    """Iterate over the pages of a list."""
    query: dict[str, Any] = fixed
    while True:
        response = client.get(path, params=query)
        assert response.status_code == 200, response.text
        page: dict[str, Any] = response.json()
        yield {**page, "bytes": len(response.content)}
        if not page["has_more"]:
            return
        query = fixed | cursor(page)


def by_last_id(page: dict[str, Any]) -> dict[str, Any]:
    return {"after": page["last_id"]}


def end(store: Store, job_id: str, output: str) -> None:
    claimed = claim_one(store, job_id, "worker-1", 30, model="scripted", reward_model="scripted")
    assert claimed
    store.leases.finish(claimed[0], Outcome("completed", output=output))


class TestJobs:
    def test_have_a_preview_instead_of_texts(self, client: TestClient, store: Store) -> None:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é" * 300}]
        job = submit(client, input=messages)
        end(store, job["id"], "An answer.")
        [listed] = client.get("/v1/jobs").json()["data"]
        assert listed["input_preview"] == "é" * 200
        assert not {"input", "output"} & set(listed)
        whole = client.get(f"/v1/jobs/{job['id']}").json()
        assert {**listed, "input": messages, "output": "An answer."} == {**whole, "input_preview": "é" * 200}

    @pytest.mark.parametrize(
        ("include", "expected"),
        [
            ("input", {"input"}),
            ("output", {"output"}),
            ("input,output", {"input", "output"}),
            ("output,input", {"input", "output"}),
        ],
    )
    def test_texts_are_included_on_request(
        self, client: TestClient, store: Store, include: str, expected: set[str]
    ) -> None:
        job = submit(client)
        end(store, job["id"], "An answer.")
        [listed] = client.get("/v1/jobs", params={"include": include}).json()["data"]
        texts = {"input": "Hello", "output": "An answer."}
        assert {name: listed[name] for name in ("input", "output") if name in listed} == {
            name: texts[name] for name in expected
        }

    @pytest.mark.parametrize("include", ["", "x", "input,", "input,output,input", "parameters"])
    def test_unknown_include_is_refused(self, client: TestClient, include: str) -> None:
        assert_problem(client.get("/v1/jobs", params={"include": include}), 422, "invalid_input", "include")

    def test_page_with_texts_ends_at_the_byte_bound(self, long_client: TestClient) -> None:
        ids = [submit(long_client, input="é" * LONG)["id"] for _ in range(12)]
        read = list(pages(long_client, "/v1/jobs", by_last_id, include="input"))
        assert [job["id"] for page in read for job in page["data"]] == ids[::-1]
        assert all(job["input"] == "é" * LONG for page in read for job in page["data"])
        assert len(read) > 2
        assert max(page["bytes"] for page in read) < paging.PAGE_BYTES + 1000
        [page] = pages(long_client, "/v1/jobs", by_last_id)
        assert page["bytes"] < 50_000

    def test_item_larger_than_a_page_is_the_only_one(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paging, "PAGE_BYTES", 10)
        ids = [submit(client)["id"] for _ in range(3)]
        read = list(pages(client, "/v1/jobs", by_last_id))
        assert [[job["id"] for job in page["data"]] for page in read] == [[job_id] for job_id in ids[::-1]]

    def test_client_iterates_over_all_pages(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = [submit(client)["id"] for _ in range(3)]
        monkeypatch.setattr(paging, "PAGE_BYTES", 10)
        transport = _Transport(client)
        with (
            Client("http://testserver") as library,
            httpx.Client(transport=transport, base_url="http://testserver") as http,
        ):
            monkeypatch.setattr(library._transport, "_http", http)
            assert [job["id"] for job in library.list(order="asc")] == ids
            assert [job["id"] for job in library.list(limit=2)] == ids[:0:-1]
            [first, *_] = library.list(order="asc", include=["input", "output"])
            assert first["input"] == first["input_preview"] == "Hello"


class _Transport(httpx.BaseTransport):
    """Transport of the client library to an API in process."""

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        got = self._client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(got.status_code, headers=dict(got.headers), content=got.content)


class TestRecord:
    def test_candidates_and_iterations_are_read_page_by_page(
        self, client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = submit(client, parameters={"sample_size": 3, "max_iterations": 2, "seed": 1})["id"]
        run_steps(store, job_id)
        whole = {name: client.get(f"/v1/jobs/{job_id}/{name}").json()["data"] for name in ("candidates", "iterations")}
        assert len(whole["candidates"]) > 6
        monkeypatch.setattr(paging, "PAGE_BYTES", 10)
        for name, key in (("candidates", "id"), ("iterations", "number")):

            def after(page: dict[str, Any], key: str = key) -> dict[str, Any]:
                return {"after": page["data"][-1][key]}

            read = list(pages(client, f"/v1/jobs/{job_id}/{name}", after))
            assert [item for page in read for item in page["data"]] == whole[name]
            assert len(read) == len(whole[name])

    def test_events_are_read_page_by_page(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        job_id = submit(client)["id"]
        for action in ("pause", "resume", "cancel"):
            client.post(f"/v1/jobs/{job_id}/{action}")
        monkeypatch.setattr(paging, "PAGE_BYTES", 10)
        read = pages(
            client, f"/v1/jobs/{job_id}/events", lambda page: {"starting_after": page["data"][-1]["sequence_number"]}
        )
        assert [[event["sequence_number"] for event in page["data"]] for page in read] == [[1], [2], [3], [4]]


class TestStore:
    def test_page_without_texts_reads_none(self, client: TestClient, store: Store) -> None:
        job_id = submit(client)["id"]
        [job] = store.jobs.page(limit=9, texts=False)
        assert (job.id, job.input, job.output, job.input_preview) == (job_id, (), None, "Hello")

    def test_texts_stop_at_the_bound_and_belong_to_the_tenant(self, client: TestClient, store: Store) -> None:
        ids = [submit(client, input="x" * 100)["id"] for _ in range(5)]
        assert len(store.jobs.texts(ids, ["input"], 250)) == 2
        assert len(store.jobs.texts(ids, ["input"], 1)) == 1
        assert len(store.jobs.texts(ids, ["output"], 250)) == 5
        assert [texts.input for texts in store.for_tenant("other").jobs.texts(ids, ["input"], 250)] == [None] * 5
