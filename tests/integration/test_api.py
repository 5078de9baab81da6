"""Submit, list and cancel jobs over HTTP, in process, on both databases."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from testing.jobs import claim_one, execute
from testing.ports import free_port
from testing.services import Valkey
from testing.waiting import HANG_SECONDS
from tests.support.api_client import KEY, UNKNOWN_ID, api_client, assert_problem, submit
from tpo.core.loop import Step, apply, locate, pending
from tpo.core.ports import Generate, Generation, Rewards, Text
from tpo.core.state import State
from tpo.db import connect
from tpo.jobs.lifecycle import JobQueries
from tpo.jobs.outcomes import Outcome, outcome_of_run
from tpo.store import Store

MakeClient = Callable[..., TestClient]


@pytest.fixture
def make_client(migrated_url: str, valkey: Valkey) -> Iterator[MakeClient]:
    with contextlib.ExitStack() as stack:
        defaults = {"database_url": migrated_url, "broker_url": valkey.url}
        yield lambda **settings: stack.enter_context(api_client(**{**defaults, **settings}))


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()


def run_steps(store: Store, job_id: str, steps: int | None = None) -> State:
    """Run a job's next model calls with deterministic replies: the reward of a text is its length."""
    claimed = claim_one(store, job_id, "worker-1", 30, model="scripted", reward_model="scripted")
    assert claimed
    lease, state = claimed
    while (request := pending(state)) and (steps is None or steps > 0):
        reply: Generation | Rewards
        if isinstance(request, Generate):
            texts = tuple(Text(text=_reply(request, i), finish_reason="stop", tokens=10) for i in range(request.n))
            reply = Generation(texts=texts, input_tokens=100, seconds=0.5)
        else:
            values = tuple(float(len(r)) for r in request.responses)
            reply = Rewards(values=values, input_tokens=7, seconds=0.25)
        after = apply(state, request, reply)
        store.leases.checkpoint(lease, Step(state, request, after, locate(after)))
        state = after
        steps = None if steps is None else steps - 1
    if pending(state) is None:
        store.leases.finish(lease, outcome_of_run(state))
    return state


def _reply(request: Generate, i: int) -> str:
    match request.kind:
        case "sample":
            return "x" * (i + 1)
        case "update":
            answer = "y" * (10 * request.iteration + i)
            return f"<improved_response>{answer}</improved_response>" if i else "no tags"
        case kind:
            return f"{kind} of {request.iteration}"


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
        assert client.get(f"/v1/jobs/{job['id']}/iterations").json() == {"object": "list", "data": []}
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


def samples(page: str) -> dict[tuple[str, ...], float]:
    """Parse a Prometheus page into values keyed by sample name and labels."""
    families = text_string_to_metric_families(page)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


class TestServer:
    def test_is_ready_with_a_worker(self, client: TestClient, store: Store) -> None:
        body = assert_problem(client.get("/readyz"), 503, "not_ready")
        assert body["checks"] == {"database": "ok", "broker": "ok", "worker": "missing"}
        store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        ready = client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json() == {"status": "ready", "checks": {"database": "ok", "broker": "ok", "worker": "ok"}}

    def test_is_not_ready_when_the_worker_missed_its_lease(
        self, client: TestClient, store: Store, engine: Engine
    ) -> None:
        store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        execute(engine, "UPDATE workers SET seen_at = seen_at - 31")
        assert_problem(client.get("/readyz"), 503, "not_ready")
        assert client.get("/v1/models").json()["data"]  # a short outage of the database must not reject jobs

    def test_readiness_reports_a_missing_broker(self, make_client: MakeClient, store: Store) -> None:
        store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        body = assert_problem(
            make_client(broker_url=f"redis://127.0.0.1:{free_port()}/0").get("/readyz"), 503, "not_ready"
        )
        assert body["checks"] == {"database": "ok", "broker": "missing", "worker": "ok"}

    def test_lists_served_models(self, client: TestClient, store: Store) -> None:
        assert client.get("/v1/models").json() == {"object": "list", "data": []}
        store.workers.register("w1", model="small", reward_model="judge", concurrency=1)
        store.workers.register("w2", model="small", reward_model="classifier", concurrency=1)
        (model,) = client.get("/v1/models").json()["data"]
        assert isinstance(model.pop("created"), int)
        assert model == {
            "id": "small",
            "object": "model",
            "owned_by": "tpo",
            "reward_models": ["classifier", "judge"],
            "workers": 2,
        }
        rewards = client.get("/v1/reward-models").json()["data"]
        assert [(r["id"], r["models"], r["workers"]) for r in rewards] == [
            ("classifier", ["small"], 1),
            ("judge", ["small"], 1),
        ]

    def test_exposes_metrics(self, client: TestClient, store: Store) -> None:
        job = submit(client)
        for job_id in (job["id"], job["id"], UNKNOWN_ID):
            client.get(f"/v1/jobs/{job_id}")
        client.get("/nowhere")
        client.request("BREW", f"/v1/jobs/{job['id']}")
        store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        metrics = samples(response.text)
        count = "tpo_http_request_seconds_count"
        assert metrics[count, "GET", "/v1/jobs/{job_id}", "200"] == 2
        assert metrics[count, "GET", "/v1/jobs/{job_id}", "404"] == 1
        assert metrics[count, "POST", "/v1/jobs", "202"] == 1
        assert metrics[count, "GET", "none", "404"] == 1
        assert {key[1] for key in metrics if key[0] == count} == {"GET", "POST", "other"}
        assert metrics["tpo_database_up",] == 1
        assert metrics["tpo_event_listeners",] == 0
        assert (metrics["tpo_jobs_waiting", "scripted"], metrics["tpo_jobs_running", "scripted"]) == (1, 0)
        assert metrics["tpo_workers", "scripted"] == 1
        assert job["id"] not in client.get("/metrics").text

    def test_metrics_report_an_unreachable_database(self, make_client: MakeClient) -> None:
        client = make_client(api_key=KEY)
        client.app.state.store = Store(  # type: ignore[attr-defined]
            connect(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none")
        )
        response = client.get("/metrics", headers={"authorization": f"Bearer {KEY}"})
        assert response.status_code == 200
        assert samples(response.text)["tpo_database_up",] == 0

    def test_lists_prompt_sets(self, client: TestClient) -> None:
        sets = {s["id"]: s for s in client.get("/v1/prompt-sets").json()["data"]}
        assert {"conversation", "separate", "tiny"} <= set(sets)
        assert [name for name, s in sets.items() if s["default"]] == ["conversation"]

    def test_liveness_and_root_links_work(self, client: TestClient) -> None:
        assert client.get("/healthz").json() == {"status": "ok"}
        greeting = client.get("/").json()
        for link in ("docs", "openapi", "jobs"):
            assert client.get(greeting[link]).status_code == 200


class TestUnexpected:
    def test_error_is_a_500_that_leaks_no_text(
        self, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_args: object) -> None:
            raise RuntimeError(" ".join(("a", "text", "of", "a", "user")))  # a traceback quotes source lines

        monkeypatch.setattr(JobQueries, "get", fail)
        response = client.get(f"/v1/jobs/{UNKNOWN_ID}", headers={"x-request-id": "find-me"})
        assert_problem(response, 500, "internal_error")
        assert "a text of a user" not in response.text
        logged = "\n".join(record.getMessage() + str(record.exc_text) for record in caplog.records)
        assert "find-me" in logged
        assert "RuntimeError" in logged
        assert "test_api.py" in logged
        assert "a text of a user" not in logged

    def test_unreachable_database_is_a_503(self, make_client: MakeClient) -> None:
        client = make_client()
        client.app.state.store = Store(  # type: ignore[attr-defined]
            connect(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none")
        )
        for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/models")):
            body = {"input": "x"} if method == "POST" else None
            assert_problem(client.request(method, path, json=body), 503, "database_unavailable")
        checks = assert_problem(client.get("/readyz"), 503, "not_ready")["checks"]
        assert checks == {"database": "missing", "broker": "ok", "worker": "unknown"}
        assert client.get("/healthz").status_code == 200


@pytest.mark.processes
def test_api_imports_no_model_code(tmp_path: Path) -> None:
    program = (
        "import sys; from api.app import create_app; create_app(); import api.__main__;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'worker', 'numpy')"
        " or m.startswith('tpo.backends')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS, cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


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
