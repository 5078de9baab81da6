"""Pause, retry, extend, delete and poll jobs over HTTP, in process, on both databases."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from testing.jobs import claim_one
from testing.services import Valkey
from testing.waiting import eventually
from tests.support.api_client import UNKNOWN_ID, api_client, assert_problem, submit
from tests.support.scripted_run import run_steps
from tpo.core.ports import Generate
from tpo.jobs.outcomes import Outcome
from tpo.store import Store


@pytest.fixture
def client(migrated_url: str, valkey: Valkey) -> Iterator[TestClient]:
    with api_client(database_url=migrated_url, broker_url=valkey.url) as client:
        yield client


def conflict(response: Any) -> None:
    assert_problem(response, 409, "wrong_state")
    assert response.headers["x-should-retry"] == "false"


def fail(store: Store, job_id: str, code: str = "worker_lost") -> None:
    claimed = claim_one(store, job_id, "worker-1", 30, model="scripted", reward_model="scripted")
    assert claimed
    store.leases.finish(claimed[0], Outcome("failed", error_code=code, error_message="It failed."))


class TestPause:
    def test_pause_and_resume_are_idempotent(self, client: TestClient) -> None:
        job_id = submit(client)["id"]
        for action, status in (("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("resume", "queued")):
            response = client.post(f"/v1/jobs/{job_id}/{action}")
            assert (response.status_code, response.json()["status"]) == (200, status)

    def test_is_requested_from_a_running_job(self, client: TestClient, store: Store) -> None:
        job_id = submit(client)["id"]
        claim_one(store, job_id, "worker-1", 30, model="scripted", reward_model="scripted")
        asked = client.post(f"/v1/jobs/{job_id}/pause").json()
        assert (asked["status"], asked["pause_requested_at"] is None) == ("in_progress", False)
        assert client.post(f"/v1/jobs/{job_id}/resume").json()["pause_requested_at"] is None

    def test_finished_job_cannot_be_changed(self, client: TestClient, store: Store) -> None:
        job_id = submit(client, parameters={"mode": "bon"})["id"]
        run_steps(store, job_id)
        for action in ("pause", "resume", "retry"):
            conflict(client.post(f"/v1/jobs/{job_id}/{action}"))


class TestRetry:
    def test_creates_a_new_job_from_a_failed_one(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 1}, metadata={"team": "a"})
        run_steps(store, job["id"], steps=2)
        store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
        store.leases.renew("worker-1", [job["id"]], -1)
        store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
        fail(store, job["id"])
        response = client.post(f"/v1/jobs/{job['id']}/retry", headers={"idempotency-key": "again"})
        assert response.status_code == 202
        new = response.json()
        assert response.headers["location"] == f"/v1/jobs/{new['id']}"
        assert (new["source_id"], new["status"], new["metadata"]) == (job["id"], "queued", {"team": "a"})
        assert new["progress"]["iteration"] == 1
        assert new["usage"]["total_tokens"] == 0
        assert len(client.get(f"/v1/jobs/{new['id']}/iterations").json()["data"]) == 1
        again = client.post(f"/v1/jobs/{job['id']}/retry", headers={"idempotency-key": "again"})
        assert again.json()["id"] == new["id"]

    def test_ends_the_delay_before_the_next_attempt(self, client: TestClient, store: Store) -> None:
        job = submit(client)
        claimed = claim_one(store, job["id"], "worker-1", 30, model="scripted", reward_model="scripted")
        assert claimed
        store.leases.release(claimed[0], delay_seconds=500)
        assert client.get(f"/v1/jobs/{job['id']}").json()["next_attempt_at"]
        response = client.post(f"/v1/jobs/{job['id']}/retry")
        assert (response.status_code, response.json()["next_attempt_at"]) == (200, None)


class TestExtend:
    def test_continues_in_a_new_job(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 1})
        conflict(client.post(f"/v1/jobs/{job['id']}/extend", json={"iterations": 1}))
        run_steps(store, job["id"])
        before = client.get(f"/v1/jobs/{job['id']}").json()
        response = client.post(f"/v1/jobs/{job['id']}/extend", json={"iterations": 2})
        assert response.status_code == 202
        new = response.json()
        assert (new["parameters"]["max_iterations"], new["progress"]["iteration"]) == (3, 2)
        assert (new["best"], new["parameters"]["seed"]) == (before["best"], job["parameters"]["seed"])
        run_steps(store, new["id"])
        after = client.get(f"/v1/jobs/{new['id']}").json()
        assert after["best"]["iteration"] == 3
        assert [i["number"] for i in client.get(f"/v1/jobs/{new['id']}/iterations").json()["data"]] == [0, 1, 2, 3]
        assert client.get(f"/v1/jobs/{job['id']}").json() == before

    @pytest.mark.parametrize("body", [{}, {"iterations": 0}, {"iterations": 51}, {"iterations": "1"}, {"more": 1}])
    def test_rejects_an_invalid_number_of_iterations(self, client: TestClient, body: Any) -> None:
        job = submit(client)
        assert client.post(f"/v1/jobs/{job['id']}/extend", json=body).status_code == 422

    def test_best_of_n_job_is_rejected(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"mode": "bon"})
        run_steps(store, job["id"])
        conflict(client.post(f"/v1/jobs/{job['id']}/extend", json={"iterations": 1}))


class TestStopping:
    def test_rules_are_stored_and_returned(self, client: TestClient) -> None:
        rules = {
            "max_output_tokens": 500,
            "max_total_tokens": 9000,
            "max_seconds": 30,
            "early_stop": {"patience": 2, "min_gain": 0.5},
            "stop_on_decline": True,
        }
        shown = submit(client, parameters=rules)["parameters"]
        assert {name: shown[name] for name in rules} == rules
        shown = submit(client, parameters={"early_stop": {}})["parameters"]
        assert shown["early_stop"] == {"patience": 1, "min_gain": 0.0}
        shown = submit(client)["parameters"]
        assert {name: shown[name] for name in rules} == {**dict.fromkeys(rules), "stop_on_decline": False}

    def test_missing_rules_come_from_the_settings(self, migrated_url: str, valkey: Valkey) -> None:
        settings = {"early_stop": {"patience": 3}, "stop_on_decline": True}
        with api_client(database_url=migrated_url, broker_url=valkey.url, **settings) as client:
            shown = submit(client)["parameters"]
            assert (shown["early_stop"], shown["stop_on_decline"]) == ({"patience": 3, "min_gain": 0.0}, True)
            shown = submit(client, parameters={"early_stop": None, "stop_on_decline": False})["parameters"]
            assert (shown["early_stop"], shown["stop_on_decline"]) == (None, False)

    @pytest.mark.parametrize(
        ("parameters", "field"),
        [
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_total_tokens": 1.5}, "max_total_tokens"),
            ({"max_seconds": 0}, "max_seconds"),
            ({"max_seconds": "60"}, "max_seconds"),
            ({"early_stop": {"patience": "2"}}, "early_stop.patience"),
            ({"early_stop": {"patience": 0}}, "early_stop.patience"),
            ({"early_stop": {"margin": 1}}, "early_stop.margin"),
            ({"early_stop": 2}, "early_stop"),
            ({"stop_on_decline": "yes"}, "stop_on_decline"),
        ],
    )
    def test_invalid_rule_is_named(self, client: TestClient, parameters: Any, field: str) -> None:
        response = client.post("/v1/jobs", json={"input": "x", "parameters": parameters})
        assert_problem(response, 422, "invalid_input", f"parameters.{field}")

    def test_exhausted_budget_ends_the_job(self, client: TestClient, store: Store) -> None:
        job = submit(client, parameters={"sample_size": 2, "max_seconds": 1.5})
        run_steps(store, job["id"])  # a policy call takes 0.5 s, a score 0.25 s
        ended = client.get(f"/v1/jobs/{job['id']}").json()
        assert (ended["status"], ended["incomplete_details"]) == ("incomplete", {"reason": "max_seconds"})
        assert (ended["output"], ended["stop_reason"], ended["usage"]["model_seconds"]) == ("xx", None, 1.75)
        assert ended["progress"] == {"iteration": 1, "max_iterations": 2, "phase": None}
        _, cut = client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"]
        assert (cut["complete"], cut["phase"], cut["reason"], cut["usage"]["model_seconds"]) == (False, None, None, 1.0)
        new = client.post(f"/v1/jobs/{job['id']}/retry").json()
        assert (new["progress"]["phase"], new["usage"]["model_seconds"]) == ("update", 0)

    def test_early_stop_completes_the_job(self, client: TestClient, store: Store) -> None:
        rule = {"early_stop": {"min_gain": 1000}}
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 4, **rule})
        run_steps(store, job["id"])
        ended = client.get(f"/v1/jobs/{job['id']}").json()
        assert (ended["status"], ended["stop_reason"], ended["incomplete_details"]) == ("completed", "early_stop", None)
        assert ended["progress"]["iteration"] == 1
        last = client.get(f"/v1/jobs/{job['id']}/events").json()["data"][-1]
        assert (last["type"], last["reason"]) == ("job.completed", "early_stop")

    def test_decline_is_reported(self, client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.support.scripted_run._reply", _shrinking_reply)
        job = submit(client, parameters={"sample_size": 2, "max_iterations": 3, "stop_on_decline": True})
        assert job["declined_iteration"] is None
        run_steps(store, job["id"])
        ended = client.get(f"/v1/jobs/{job['id']}").json()
        assert (ended["status"], ended["stop_reason"], ended["declined_iteration"]) == ("completed", "decline", 1)
        declined = [i["declined"] for i in client.get(f"/v1/jobs/{job['id']}/iterations").json()["data"]]
        assert declined == [False, True]
        types = [e["type"] for e in client.get(f"/v1/jobs/{job['id']}/events").json()["data"]]
        assert types[-2:] == ["job.iteration.declined", "job.completed"]


def _shrinking_reply(request: Generate, i: int) -> str:
    text = "z" * (9 - request.iteration)
    return f"<improved_response>{text}</improved_response>" if request.kind == "update" else text


def test_only_an_ended_job_can_be_deleted(client: TestClient, store: Store) -> None:
    job_id = submit(client)["id"]
    conflict(client.delete(f"/v1/jobs/{job_id}"))
    client.post(f"/v1/jobs/{job_id}/cancel")
    assert client.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job", "deleted": True}
    assert_problem(client.delete(f"/v1/jobs/{job_id}"), 404, "job_not_found")
    assert_problem(client.get(f"/v1/jobs/{job_id}/events"), 404, "job_not_found")


@pytest.mark.parametrize("path", ["pause", "resume", "retry", "extend", "events"])
def test_unknown_job_is_not_found(client: TestClient, path: str) -> None:
    method = "GET" if path == "events" else "POST"
    body = {"iterations": 1} if path == "extend" else None
    assert_problem(client.request(method, f"/v1/jobs/{UNKNOWN_ID}/{path}", json=body), 404, "job_not_found")


class TestPolling:
    def test_unchanged_job_is_a_304(self, client: TestClient) -> None:
        path = f"/v1/jobs/{submit(client)['id']}"
        first = client.get(path)
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            same = client.get(path, headers={"if-none-match": known})
            assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
        client.post(f"{path}/pause")
        changed = client.get(path, headers={"if-none-match": tag})
        assert (changed.status_code, changed.json()["status"]) == (200, "paused")
        assert changed.headers["etag"] != tag

    def _respond_while(self, client: TestClient, act: Callable[[], object], ask: Callable[[], Any]) -> Any:
        """Call `ask`, call `act` while the server waits for a change, and return the response."""
        broadcaster = client.app.state.broadcaster  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            eventually(lambda: broadcaster.subscriptions == 1, why="the server should wait for a change")
            act()
            return asked.result()

    def test_waits_for_the_end(self, client: TestClient) -> None:
        path = f"/v1/jobs/{submit(client)['id']}"
        response = self._respond_while(
            client, lambda: client.post(f"{path}/cancel"), lambda: client.get(path, params={"wait": 60})
        )
        assert response.json()["status"] == "cancelled"
        assert client.get(path, params={"wait": 30}).json()["status"] == "cancelled"

    def test_waits_for_a_change(self, client: TestClient) -> None:
        path = f"/v1/jobs/{submit(client)['id']}"
        tag = {"if-none-match": client.get(path).headers["etag"]}
        response = self._respond_while(
            client, lambda: client.post(f"{path}/pause"), lambda: client.get(path, params={"wait": 60}, headers=tag)
        )
        assert (response.status_code, response.json()["status"]) == (200, "paused")
        assert client.get(path, params={"wait": 30}, headers=tag).status_code == 200

    def test_wait_is_limited_by_the_request(self, client: TestClient) -> None:
        path = f"/v1/jobs/{submit(client)['id']}"
        assert client.get(path, params={"wait": 0.1}).json()["status"] == "queued"
        tag = {"if-none-match": client.get(path).headers["etag"]}
        assert client.get(path, params={"wait": 0.1}, headers=tag).status_code == 304

    @pytest.mark.parametrize("wait", ["61", "-1", "x", "nan", "inf"])
    def test_rejects_an_invalid_wait(self, client: TestClient, wait: str) -> None:
        assert_problem(client.get(f"/v1/jobs/{UNKNOWN_ID}", params={"wait": wait}), 422, "invalid_input", "wait")

    def test_submit_can_wait_for_the_end(self, client: TestClient, store: Store) -> None:
        def end() -> None:
            (job,) = eventually(lambda: store.jobs.page(limit=1), why="the submitted job should be stored")
            run_steps(store, job.id)

        def post(seconds: str) -> Any:
            body = {"input": "x", "parameters": {"mode": "bon"}}
            return client.post("/v1/jobs", json=body, headers={"prefer": f"respond-async, wait={seconds}"})

        response = self._respond_while(client, end, lambda: post("60"))
        assert (response.status_code, response.json()["status"]) == (200, "completed")
        assert response.headers["preference-applied"] == "wait=60"
        immediate = post("0")
        assert (immediate.status_code, immediate.json()["status"]) == (202, "queued")


class TestMetadataFilter:
    def test_returns_jobs_with_all_pairs(self, client: TestClient) -> None:
        pairs = [{"team": "a", "n": "1"}, {"team": "a", "n": "2"}, {"team": "b"}, {}, {'we"ird.$[0] key': "v'%"}]
        ids = [submit(client, metadata=metadata)["id"] for metadata in pairs]

        def found(**wanted: str) -> list[int]:
            params = {f"metadata[{key}]": value for key, value in wanted.items()}
            listed = client.get("/v1/jobs", params={"order": "asc", **params})
            assert listed.status_code == 200, listed.text
            return [ids.index(job["id"]) for job in listed.json()["data"]]

        assert found(team="a") == [0, 1]
        assert found(team="a", n="2") == [1]
        assert found(**{'we"ird.$[0] key': "v'%"}) == [4]
        assert found(team="A") == found(none="a") == found(**{'"': "x"}) == []

    def test_rejects_more_pairs_than_a_job_can_have(self, client: TestClient) -> None:
        pairs = {f"metadata[key-{number}]": "value" for number in range(17)}
        problem = assert_problem(client.get("/v1/jobs", params=pairs), 422, "invalid_input", "metadata[key-16]")
        assert "at most 16 pairs" in problem["detail"]
        del pairs["metadata[key-16]"]
        assert client.get("/v1/jobs", params=pairs).json()["data"] == []

    @pytest.mark.parametrize("name", ["metadata", "metadata[]", "metadata[a", "meta[a]", "x", "metadata[a\x00]"])
    def test_rejects_other_parameter_names(self, client: TestClient, name: str) -> None:
        assert_problem(client.get("/v1/jobs", params={name: "x"}), 422, "invalid_input", name)


def test_running_job_estimates_its_finish(client: TestClient, store: Store) -> None:
    job = submit(client, parameters={"sample_size": 2, "max_iterations": 1})
    assert job["estimated_finish"] is None
    run_steps(store, job["id"], steps=2)  # 0.75 s of calls; four calls remain
    row = store.jobs.get(job["id"])
    assert row.progressed_at
    estimate = client.get(f"/v1/jobs/{job['id']}").json()["estimated_finish"]
    assert estimate == int(row.progressed_at + 0.75 / 2 * 4)
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.get(f"/v1/jobs/{job['id']}").json()["estimated_finish"] is None


def test_ended_job_has_an_expiry_time(migrated_url: str, valkey: Valkey) -> None:
    with api_client(database_url=migrated_url, broker_url=valkey.url, retention_days=2) as client:
        job = submit(client)
        assert job["expires_at"] is None
        ended = client.post(f"/v1/jobs/{job['id']}/cancel").json()
        assert ended["expires_at"] - ended["completed_at"] in (2 * 86400, 2 * 86400 + 1)
