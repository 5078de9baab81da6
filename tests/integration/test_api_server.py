"""Probes, models, metrics and unexpected errors of the API, in process, on both databases."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from testing.jobs import execute
from testing.ports import free_port
from testing.waiting import HANG_SECONDS
from tests.support.api_client import KEY, UNKNOWN_ID, assert_problem, submit
from tpo.db import connect
from tpo.jobs.lifecycle import JobQueries
from tpo.store import Store

MakeClient = Callable[..., TestClient]


def samples(page: str) -> dict[tuple[str, ...], float]:
    """Parse a Prometheus page into values keyed by sample name and labels."""
    families = text_string_to_metric_families(page)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


class TestServer:
    def test_is_ready_with_a_worker(self, client: TestClient, store: Store) -> None:
        body = assert_problem(client.get("/readyz"), 503, "not_ready")
        well = {"database": "ok", "broker": "ok", "queue": "ok", "disk": "ok"}
        assert body["checks"] == {**well, "worker": "missing"}
        store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        ready = client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json() == {"status": "ready", "checks": {**well, "worker": "ok"}}

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
        assert body["checks"] == {"database": "ok", "broker": "missing", "worker": "ok", "queue": "ok", "disk": "ok"}

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
        assert metrics["tpo_jobs_in_quarantine", "scripted"] == 0
        assert metrics["tpo_rescue_delay_seconds",] == 0
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
        assert "test_api_server.py" in logged
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
        unknown = dict.fromkeys(("worker", "queue", "disk"), "unknown")
        assert checks == {"database": "missing", "broker": "ok", **unknown}
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
