"""Submit, list and cancel jobs over HTTP, in process, on both databases."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from testing.jobs import claim_one
from testing.services import Valkey
from tests.support.api_client import UNKNOWN_ID, assert_problem, submit
from tests.support.scripted_run import run_steps
from tpo.store import Store


class TestSubmit:
    def test_returns_job_and_location(self, client: TestClient) -> None:
        response = client.post("/v1/jobs", json={"input": "Hello"})
        assert response.status_code == 202
        job = response.json()
        assert response.headers["location"] == f"/v1/jobs/{job['id']}"
        assert client.get(response.headers["location"]).json() == job
        seed = job["parameters"].pop("seed")
        assert 0 <= seed < 2**53
        assert job.pop("id").startswith("job_")
        assert isinstance(job.pop("created_at"), int)
        assert job == {
            "object": "job",
            "status": "queued",
            "priority": 0,
            "model": "scripted",
            "input": "Hello",
            "parameters": {
                "mode": "tpo",
                "sample_size": 5,
                "max_iterations": 2,
                "temperature": 0.7,
                "top_p": 0.95,
                "max_tokens": 2048,
                "stop": [],
                "critique_temperature": 0.7,
                "critique_top_p": 0.99,
                "critique_max_tokens": 8192,
                "max_output_tokens": None,
                "max_total_tokens": None,
                "max_seconds": None,
                "early_stop": None,
                "stop_on_decline": False,
                "reward_model": "scripted",
                "prompt_set": "conversation",
                "prompt_set_version": 1,
            },
            "metadata": {},
            "started_at": None,
            "completed_at": None,
            "cancel_requested_at": None,
            "pause_requested_at": None,
            "next_attempt_at": None,
            "deadline_at": None,
            "estimated_finish": None,
            "expires_at": None,
            "external_id": None,
            "source_id": None,
            "attempt": 0,
            "max_attempts": 3,
            "progress": {"iteration": 0, "max_iterations": 2, "phase": None},
            "best": None,
            "declined_iteration": None,
            "output": None,
            "error": None,
            "incomplete_details": None,
            "stop_reason": None,
            "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "reward_tokens": 0, "model_seconds": 0},
        }

    def test_stores_every_given_field(self, client: TestClient, store: Store) -> None:
        messages = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "😀 <answer> {{ }} $query"},
        ]
        parameters = {
            "mode": "revision",
            "sample_size": 1,
            "max_iterations": 0,
            "temperature": 0,
            "top_p": 1,
            "max_tokens": 1,
            "stop": ["END", "\n\n"],
            "critique_temperature": 2,
            "critique_top_p": 0.5,
            "critique_max_tokens": 7,
            "seed": 2**63 - 1,
            "max_output_tokens": 10**12,
            "max_total_tokens": 1,
            "max_seconds": 0.5,
            "early_stop": {"patience": 50, "min_gain": 1e300},
            "stop_on_decline": True,
            "reward_model": "scripted",
            "prompt_set": "separate",
        }
        metadata = {"k" * 64: "v" * 512, "empty": ""}
        job = submit(
            client,
            model="scripted",
            input=messages,
            parameters=parameters,
            metadata=metadata,
            deadline_seconds=60,
        )
        assert job["input"] == messages
        assert job["parameters"] == {**parameters, "prompt_set_version": 1}
        assert job["metadata"] == metadata
        assert job["deadline_at"] - job["created_at"] == 60
        state = store.jobs.state(job["id"])
        assert [m.model_dump() for m in state.input] == messages
        assert state.params.seed == 2**63 - 1
        assert state.prompts.name == "separate"

    def test_draws_a_seed_for_each_job_without_one(self, client: TestClient) -> None:
        assert len({submit(client)["parameters"]["seed"] for _ in range(3)}) == 3

    def test_best_of_n_has_no_iterations(self, client: TestClient) -> None:
        assert submit(client, parameters={"mode": "bon"})["progress"]["max_iterations"] == 0

    def test_notification_contains_only_the_job_id(self, client: TestClient, valkey: Valkey) -> None:
        import redis

        job = submit(client, input="a text that must not be sent")
        broker = redis.Redis(port=valkey.port)
        messages = b"".join(broker.lrange("tpo.jobs.scripted", 0, -1))  # type: ignore[arg-type]
        broker.close()
        assert job["id"].encode() in messages
        assert b"must not be sent" not in messages

    def test_rejects_unserved_models(self, client: TestClient, store: Store) -> None:
        def post(model: str | None, reward_model: str | None) -> Any:
            parameters = {"reward_model": reward_model} if reward_model else {}
            body = {"input": "x", "parameters": parameters, **({"model": model} if model else {})}
            return client.post("/v1/jobs", json=body)

        assert_problem(post("other", None), 422, "unknown_model", "model")
        assert_problem(post(None, "other"), 422, "unknown_model", "parameters.reward_model")
        store.workers.register("w1", model="other", reward_model="judge", concurrency=1)
        assert post("other", "judge").status_code == 202
        assert "judge" in assert_problem(post("other", None), 422, "unknown_model", "parameters.reward_model")["detail"]
        assert_problem(post("scripted", "judge"), 422, "unknown_model", "parameters.reward_model")
        store.workers.deregister("w1")
        assert_problem(post("other", "judge"), 422, "unknown_model", "model")

    def test_default_prompt_set_depends_on_the_policy(self, client: TestClient, store: Store) -> None:
        store.workers.register("w1", model="demo", reward_model="demo", concurrency=1)
        job = submit(client, model="demo", parameters={"reward_model": "demo"})
        assert job["parameters"]["prompt_set"] == "tiny"


class TestList:
    def test_paginates_by_last_id(self, client: TestClient) -> None:
        ids = [submit(client, input=f"job {i}")["id"] for i in range(5)]
        newest_first = sorted(ids, reverse=True)
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = client.get("/v1/jobs", params={"limit": "2", **after}).json()
            assert page["object"] == "list"
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            seen += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert seen == newest_first
        oldest_first = client.get("/v1/jobs", params={"order": "asc"}).json()
        assert [job["id"] for job in oldest_first["data"]] == newest_first[::-1]
        assert oldest_first["has_more"] is False

    def test_is_empty_without_jobs(self, client: TestClient) -> None:
        page = client.get("/v1/jobs").json()
        assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}

    def test_filters_by_status(self, client: TestClient) -> None:
        first, second = submit(client)["id"], submit(client)["id"]
        client.post(f"/v1/jobs/{first}/cancel")

        def listed(*statuses: str) -> set[str]:
            return {job["id"] for job in client.get("/v1/jobs", params={"status": list(statuses)}).json()["data"]}

        assert listed("queued") == {second}
        assert listed("cancelled") == {first}
        assert listed("queued", "cancelled") == {first, second}


class TestCancel:
    def test_ends_a_queued_job_immediately_and_is_idempotent(self, client: TestClient) -> None:
        job = submit(client)
        cancelled = client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert cancelled.json()["completed_at"] >= job["created_at"]
        assert client.post(f"/v1/jobs/{job['id']}/cancel").json() == cancelled.json()

    def test_marks_a_running_job_as_cancelling(self, client: TestClient, store: Store) -> None:
        job = submit(client)
        claim_one(store, job["id"], "worker-1", 30, model="scripted", reward_model="scripted")
        assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "cancelling"

    def test_leaves_a_finished_job_unchanged(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"mode": "bon"})
        run_steps(store, job["id"])
        response = client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (response.status_code, response.json()["status"]) == (200, "completed")
        assert response.json()["cancel_requested_at"] is None


@pytest.mark.parametrize("job_id", [UNKNOWN_ID, "x", "job_", "%00", UNKNOWN_ID + "%0A", "%F0%9F%98%80", "x" * 5000])
@pytest.mark.parametrize("path", ["", "/iterations", "/candidates", "/cancel"])
def test_unknown_job_is_not_found(client: TestClient, job_id: str, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    assert_problem(client.request(method, f"/v1/jobs/{job_id}{path}"), 404, "job_not_found")


def test_unknown_paths_and_methods_are_rejected(client: TestClient) -> None:
    assert_problem(client.get("/v1/nothing"), 404, "not_found")
    assert_problem(client.post("/v1/jobs/", json={"input": "x"}), 404, "not_found")
    assert_problem(client.get("/v1/jobs//"), 404, "not_found")
    known = {"/v1/jobs": {"GET", "POST"}, f"/v1/jobs/{UNKNOWN_ID}": {"GET", "DELETE"}, "/healthz": {"GET"}}
    for path, methods in known.items():
        response = client.put(path, json={})
        assert_problem(response, 405, "method_not_allowed")
        assert set(response.headers["allow"].split(", ")) == methods
    assert_problem(client.get(f"/v1/jobs/{UNKNOWN_ID}?waits=5"), 422, "invalid_input", "waits")


def test_priority_is_validated_and_inherited(client: TestClient, store: Store) -> None:
    assert submit(client)["priority"] == 0
    high, low = submit(client, priority=100), submit(client, priority=-100)
    assert (high["priority"], low["priority"]) == (100, -100)
    assert [job["priority"] for job in client.get("/v1/jobs").json()["data"]] == [-100, 100, 0]
    for wrong in (101, -101, 1.5, "5", None, True):
        rejected = client.post("/v1/jobs", json={"input": "Hello", "priority": wrong})
        assert_problem(rejected, 422, "invalid_input", "priority")
    run_steps(store, high["id"])
    extended = client.post(f"/v1/jobs/{high['id']}/extend", json={"iterations": 1})
    assert (extended.status_code, extended.json()["priority"]) == (202, 100)
    response = client.post("/v1/responses", json={"input": "Hello", "background": True, "tpo": {"priority": 7}})
    assert client.get(f"/v1/jobs/job_{response.json()['id'].partition('_')[2]}").json()["priority"] == 7
