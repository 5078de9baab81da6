"""Iterations and candidates of jobs over HTTP, in process, on both databases."""

from fastapi.testclient import TestClient
from sqlalchemy import update

from testing.jobs import claim_one
from tests.support.api_client import submit
from tests.support.scripted_run import run_steps
from tpo.jobs.outcomes import Outcome
from tpo.jobs.tables import Job
from tpo.store import Store


def test_job_of_another_version_is_shown_and_cancelled(client: TestClient, store: Store) -> None:
    jobs = [submit(client) for _ in range(2)]
    with store.engine.begin() as connection:
        changed = {"sample_size": 7, "mode": "of the future", "new": 1}
        messages = [{"role": "tool", "content": "Hello"}]
        connection.execute(update(Job).where(Job.id == jobs[0]["id"]).values(params=changed, input=messages))
    shown = client.get(f"/v1/jobs/{jobs[0]['id']}").json()
    assert (shown["parameters"]["mode"], shown["parameters"]["sample_size"], shown["input"]) == ("tpo", 7, "Hello")
    assert {job["id"] for job in client.get("/v1/jobs").json()["data"]} == {job["id"] for job in jobs}
    listed = client.get("/v1/jobs", params={"include": "input"}).json()["data"]
    assert next(job["input"] for job in listed if job["id"] == jobs[0]["id"]) == "Hello"
    assert client.post(f"/v1/jobs/{jobs[0]['id']}/cancel").json()["status"] == "cancelled"


class TestRecord:
    def test_returns_each_iteration(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 3, "max_iterations": 1, "seed": 1})
        run_steps(store, job["id"])
        first, second = client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"]
        assert first["number"] == 0
        assert (first["complete"], first["phase"], first["reason"]) == (True, None, None)
        assert (first["chosen"], first["rejected"], first["critique"]) == (None, None, None)
        assert (first["mean_reward"], first["best_reward"]) == (2.0, 3.0)
        assert [c["kind"] for c in first["calls"]] == ["sample", "score"]
        assert first["usage"] == {
            "input_tokens": 100,
            "output_tokens": 30,
            "total_tokens": 130,
            "reward_tokens": 7,
            "model_seconds": 0.75,
        }
        assert second["chosen"] == {"id": "0-2", "text": "xxx", "reward": 3.0}
        assert second["rejected"] == {"id": "0-0", "text": "x", "reward": 1.0}
        assert (second["critique"], second["gradient"]) == ("critique of 1", "gradient of 1")
        assert second["candidates"] == [
            {"id": "1-0", "reward": None, "unusable": "no_answer_tags"},
            {"id": "1-1", "reward": 11.0, "unusable": None},
            {"id": "1-2", "reward": 12.0, "unusable": None},
        ]
        assert (second["mean_reward"], second["best_reward"]) == (11.5, 12.0)
        assert [c["seconds"] for c in second["calls"]] == [0.5, 0.5, 0.5, 0.25]
        after = client.get(f"/v1/jobs/{job['id']}").json()
        assert (after["status"], after["output"]) == ("completed", "y" * 12)
        assert after["best"] == {"iteration": 1, "candidate_id": "1-2", "reward": 12.0}
        assert after["started_at"] <= after["completed_at"]
        assert after["usage"]["total_tokens"] == first["usage"]["total_tokens"] + second["usage"]["total_tokens"]

    def test_lists_candidates(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 1})
        run_steps(store, job["id"])
        listed = client.get(f"/v1/jobs/{job['id']}/candidates").json()
        assert listed["object"] == "list"
        assert [c["id"] for c in listed["data"]] == ["0-0", "0-1", "1-0", "1-1"]
        assert listed["data"][2] == {
            "id": "1-0",
            "object": "candidate",
            "iteration": 1,
            "sample": 0,
            "text": "no tags",
            "reward": None,
            "parts": [],
            "unusable": "no_answer_tags",
            "tokens": 10,
        }

    def test_shows_the_running_iteration(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 2})
        assert client.get(f"/v1/jobs/{job['id']}/iterations").json() == {
            "object": "list",
            "data": [],
            "has_more": False,
        }
        run_steps(store, job["id"], steps=3)
        now = client.get(f"/v1/jobs/{job['id']}").json()
        assert now["status"] == "in_progress"
        assert now["progress"] == {"iteration": 1, "max_iterations": 2, "phase": "gradient"}
        first, second = client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"]
        assert (first["complete"], first["phase"]) == (True, None)
        assert (second["complete"], second["phase"], second["gradient"]) == (False, "gradient", None)

    def test_gives_the_reason_of_an_unusable_iteration(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 1, "max_iterations": 1})
        run_steps(store, job["id"])
        assert client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"][1]["reason"] == "no_usable_sample"

    def test_returns_the_error_of_a_failed_job(self, client: TestClient, store: Store) -> None:
        job = submit(client)
        claimed = claim_one(store, job["id"], "worker-1", 30, model="scripted", reward_model="scripted")
        assert claimed
        store.leases.finish(claimed[0], Outcome("failed", error_code="context_too_long", error_message="Too long."))
        after = client.get(f"/v1/jobs/{job['id']}").json()
        assert after["error"] == {"code": "context_too_long", "message": "Too long.", "param": None}
        assert client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"] == []

    def test_returns_the_reason_of_an_incomplete_job(self, client: TestClient, store: Store) -> None:
        job = submit(client)
        claimed = claim_one(store, job["id"], "worker-1", 30, model="scripted", reward_model="scripted")
        assert claimed
        store.leases.finish(claimed[0], Outcome("incomplete", output="best so far", incomplete_reason="deadline"))
        after = client.get(f"/v1/jobs/{job['id']}").json()
        assert (after["incomplete_details"], after["output"]) == ({"reason": "deadline"}, "best so far")
