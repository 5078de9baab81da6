"""Idempotent requests and quotas over HTTP."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from testing.processes import System
from testing.services import Valkey
from testing.waiting import HANG_SECONDS
from tests.integration.test_api_process import started_api
from tests.support.api_client import api_client, submit
from tpo.store import Store
from tpo.tenants.tenants import Limits

BODY = {"input": "Hello", "metadata": {"a": "1", "b": "2"}}


@pytest.fixture
def client(migrated_url: str, valkey: Valkey) -> Iterator[TestClient]:
    with api_client(database_url=migrated_url, broker_url=valkey.url) as client:
        yield client


def assert_rejected(response: Any, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


class TestKey:
    def post(self, client: TestClient, key: str, body: Any = BODY) -> Any:
        return client.post("/v1/jobs", json=body, headers={"idempotency-key": key})

    def test_duplicate_request_returns_the_first_job(self, client: TestClient) -> None:
        first = self.post(client, "key")
        again = self.post(client, "key", {"metadata": {"b": "2", "a": "1"}, "input": "Hello"})
        assert (first.status_code, again.status_code) == (202, 202)
        assert again.json() == first.json()
        assert again.headers["location"] == first.headers["location"]
        assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")

    def test_key_with_another_body_is_rejected(self, client: TestClient) -> None:
        self.post(client, "key")
        for body in ({**BODY, "input": "Bye"}, {**BODY, "model": "scripted"}):
            assert_rejected(self.post(client, "key", body), 422, "idempotency_key_reused", "Idempotency-Key")
        assert len(client.get("/v1/jobs").json()["data"]) == 1

    @pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "é"])
    def test_malformed_key_is_rejected(self, client: TestClient, key: str) -> None:
        response = client.post("/v1/jobs", json=BODY, headers={b"idempotency-key": key.encode()})
        assert_rejected(response, 422, "invalid_input", "Idempotency-Key")
        assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("named", ["key", "external_id"])
def test_200_concurrent_requests_to_3_processes_create_one_job(system: System, named: str) -> None:
    with contextlib.ExitStack() as stack:
        apis = [stack.enter_context(started_api(system)) for _ in range(3)]
        clients = [stack.enter_context(httpx.Client(base_url=api.url, timeout=HANG_SECONDS)) for api in apis]
        body = {**BODY, **({"external_id": "mine"} if named == "external_id" else {})}
        headers = {"idempotency-key": "one"} if named == "key" else {}

        def post(i: int) -> httpx.Response:
            return clients[i % 3].post("/v1/jobs", json=body, headers=headers)

        with ThreadPoolExecutor(30) as pool:
            responses = list(pool.map(post, range(200)))
        assert Counter(response.status_code for response in responses) == {202: 200}
        assert len({response.json()["id"] for response in responses}) == 1
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
        assert len(system.store.jobs.page(limit=9)) == 1


class TestExternalId:
    def test_duplicate_request_returns_the_first_job(self, client: TestClient) -> None:
        first = submit(client, external_id="mine")
        assert submit(client, external_id="mine") == first
        assert first["external_id"] == "mine"

    def test_another_request_is_a_conflict_without_retry(self, client: TestClient) -> None:
        submit(client, external_id="mine")
        response = client.post("/v1/jobs", json={"input": "Bye", "external_id": "mine"})
        assert_rejected(response, 409, "external_id_taken")
        assert response.headers["x-should-retry"] == "false"

    def test_retry_of_the_openai_client_returns_the_first_job(self, system: System) -> None:
        with started_api(system) as api:
            job_ids: list[str] = []

            def fail_the_first(response: Any) -> None:
                response.read()
                job_ids.append(response.json()["id"])
                if len(job_ids) == 1:
                    response.status_code = 500

            http = openai.DefaultHttpxClient(event_hooks={"response": [fail_the_first]})
            with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", http_client=http) as client:
                job: Any = client.post("/jobs", body={**BODY, "external_id": "mine"}, cast_to=object)
            assert job_ids == [job["id"]] * 2
            assert len(system.store.jobs.page(limit=9)) == 1


class TestQuota:
    def test_jobs_per_minute_are_limited(self, migrated_url: str, valkey: Valkey) -> None:
        with api_client(database_url=migrated_url, broker_url=valkey.url, max_jobs_per_minute=2) as client:
            for remaining in ("1", "0"):
                accepted = client.post("/v1/jobs", json=BODY)
                assert accepted.status_code == 202
                assert accepted.headers["x-ratelimit-limit-requests"] == "2"
                assert accepted.headers["x-ratelimit-remaining-requests"] == remaining
                assert 0 < float(accepted.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
            response = client.post("/v1/jobs", json=BODY)
            assert_rejected(response, 429, "rate_limit_exceeded")
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            assert len(client.get("/v1/jobs").json()["data"]) == 2

    def test_jobs_in_flight_are_limited(self, migrated_url: str, valkey: Valkey) -> None:
        with api_client(database_url=migrated_url, broker_url=valkey.url, max_jobs_in_flight=1) as client:
            job = submit(client)
            response = client.post("/v1/jobs", json=BODY)
            assert_rejected(response, 429, "too_many_jobs_in_flight")
            assert response.headers["retry-after"]
            client.post(f"/v1/jobs/{job['id']}/cancel")
            assert_rejected(client.post(f"/v1/jobs/{job['id']}/extend", json={"iterations": 1}), 409, "wrong_state")
            submit(client)

    def test_limit_of_the_tenant_applies(self, migrated_url: str, valkey: Valkey, store: Store) -> None:
        store.tenants.set_limits("default", Limits(in_flight=0))
        with api_client(database_url=migrated_url, broker_url=valkey.url) as client:
            assert_rejected(client.post("/v1/jobs", json=BODY), 429, "too_many_jobs_in_flight")
