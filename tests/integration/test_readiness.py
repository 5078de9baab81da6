"""Readiness reports jobs that wait next to free slots, and a full disk."""

import os
from collections.abc import Callable
from types import SimpleNamespace

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event

from testing.jobs import SERVES, claim, create, execute
from tests.support.api_client import assert_problem
from tpo.core.errors import StoreUnavailableError
from tpo.db import is_disk_full
from tpo.jobs.scheduling import Rules
from tpo.store import Store


def wait_for_minutes(engine: Engine) -> None:
    execute(engine, "UPDATE jobs SET queued_at = queued_at - 600")


def test_job_next_to_a_free_slot_makes_it_unready(client: TestClient, store: Store, engine: Engine) -> None:
    store.workers.register("w1", concurrency=1, **SERVES)
    job_id = create(store)
    assert client.get("/readyz").status_code == 200
    wait_for_minutes(engine)
    body = assert_problem(client.get("/readyz"), 503, "not_ready")
    assert body["checks"]["queue"] == "stalled"
    assert "free slots" in body["detail"]
    claim(store, job_id, "w1")
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("cause", ["busy", "paused", "another model", "no worker", "limit"])
def test_job_that_cannot_run_is_not_stalled(engine: Engine, store: Store, cause: str) -> None:
    running, _ = create(store), create(store)
    if cause != "no worker":
        model = "another" if cause == "another model" else SERVES["model"]
        concurrency = 1 if cause == "busy" else 2
        store.workers.register("w1", model=model, reward_model=SERVES["reward_model"], concurrency=concurrency)
    claim(store, running, "w1")
    wait_for_minutes(engine)
    if cause == "paused":
        store.queues.pause(SERVES["model"])
    rules = Rules(max_running=1) if cause == "limit" else Rules()
    assert store.queues.stalled(60, 30, rules) == []


def test_full_disk_makes_it_unready(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
    fill_disk(store.engine, monkeypatch, client.app.state.disk_probe._engine)  # type: ignore[attr-defined]
    body = assert_problem(client.get("/readyz"), 503, "not_ready")
    assert body["checks"]["disk"] == "full"
    assert "disk that holds the database is full" in body["detail"]


def test_disk_check_leaves_nothing_behind(engine: Engine, store: Store) -> None:
    for _ in range(3):
        assert not is_disk_full(engine)
    store.ping()


def test_refused_disk_check_is_unknown(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch, make_client: Callable[..., TestClient]
) -> None:
    def refuse(_engine: Engine) -> bool:
        raise StoreUnavailableError()

    store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
    monkeypatch.setattr("api.routes.health.is_disk_full", refuse)
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["disk"]) == (200, "unknown")


def fill_disk(engine: Engine, monkeypatch: pytest.MonkeyPatch, used: Engine) -> None:
    """Let the database's disk look full: to the file system's caller, or to the statement that needs more pages."""
    if engine.dialect.name == "sqlite":
        monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=1, f_frsize=4096))
        return

    @event.listens_for(used, "before_cursor_execute")
    def _fail(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO tpo_disk_probe"):
            raise psycopg.errors.DiskFull("could not extend file: No space left on device")
