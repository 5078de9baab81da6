"""API keys and tenants over HTTP and on the command line, on both databases."""

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from typer.testing import CliRunner

from api import auth
from testing.fakes import new_state
from testing.jobs import execute
from testing.ports import free_port
from testing.services import Valkey
from tests.support.api_client import KEY, UNKNOWN_ID, api_client, assert_problem, submit
from tpo.cli import app
from tpo.core.errors import QuotaExceededError
from tpo.db import connect
from tpo.store import Store
from tpo.tenants.tenants import Limits


@contextlib.contextmanager
def clients(url: str, valkey: Valkey, *secrets: str | None, **settings: Any) -> Iterator[list[TestClient]]:
    """Yield clients of one server, one for each API key."""
    with api_client(database_url=url, broker_url=valkey.url, **settings) as client:
        yield [_with_key(client, secret) for secret in secrets]


def _with_key(client: TestClient, secret: str | None) -> TestClient:
    # Not entered: the first client runs the application's lifespan.
    return TestClient(client.app, headers={"authorization": f"Bearer {secret}"} if secret else {})


def test_tenants_cannot_see_each_other(migrated_url: str, valkey: Valkey, store: Store) -> None:
    first, second = (store.keys.create("k", tenant).secret for tenant in ("acme", "other"))
    with clients(migrated_url, valkey, first, second, KEY, api_key=KEY) as (acme, other, default):
        job = submit(acme)
        assert acme.get(f"/v1/jobs/{job['id']}").json() == job
        for stranger in (other, default):
            for method, path in (("GET", ""), ("GET", "/iterations"), ("GET", "/candidates"), ("POST", "/cancel")):
                theirs = stranger.request(method, f"/v1/jobs/{job['id']}{path}")
                unknown = stranger.request(method, f"/v1/jobs/{UNKNOWN_ID}{path}")
                assert_problem(theirs, 404, "job_not_found")
                same = theirs.text.replace(job["id"], UNKNOWN_ID)
                assert same == unknown.text
            assert stranger.get("/v1/jobs").json()["data"] == []
            assert stranger.get("/v1/jobs", params={"after": job["id"], "order": "asc"}).json()["data"] == []
        for stranger in (acme, other):
            assert_problem(stranger.get("/metrics"), 404, "not_found")
        assert default.get("/metrics").status_code == 200
        own = submit(default)
        assert [j["id"] for j in default.get("/v1/jobs").json()["data"]] == [own["id"]]
        assert store.jobs.get(own["id"]).tenant == "default"
        assert acme.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"


def test_server_without_keys_requires_none(migrated_url: str, valkey: Valkey, store: Store) -> None:
    with clients(migrated_url, valkey, None, "whatever") as (without, with_some_key):
        job = submit(without)
        assert with_some_key.get(f"/v1/jobs/{job['id']}").status_code == 200
    secret = store.keys.create("first", "acme").secret
    with clients(migrated_url, valkey, None, "whatever", secret) as (without, wrong, right):
        for closed in (without, wrong):
            assert_problem(closed.get("/v1/jobs"), 401, "invalid_api_key")
            assert closed.get("/healthz").status_code == 200
        assert right.get("/v1/jobs").json()["data"] == []


def test_server_can_require_keys_before_one_exists(migrated_url: str, valkey: Valkey) -> None:
    with clients(migrated_url, valkey, None, require_key=True) as (without,):
        assert_problem(without.get("/v1/jobs"), 401, "invalid_api_key")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer {} {}", "Bearer {}x"])
def test_malformed_key_is_rejected(migrated_url: str, valkey: Valkey, store: Store, header: str) -> None:
    secret = store.keys.create("k", "acme").secret
    with clients(migrated_url, valkey, None) as (client,):
        response = client.get("/v1/jobs", headers={"authorization": header.replace("{}", secret)})
        assert_problem(response, 401, "invalid_api_key")


def test_revoked_key_is_rejected_within_seconds(
    migrated_url: str, valkey: Valkey, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = store.keys.create("k", "acme")
    with clients(migrated_url, valkey, key.secret) as (client,):
        assert client.get("/v1/jobs").status_code == 200
        store.keys.revoke(key.row.id)
        assert client.get("/v1/jobs").status_code == 200  # the key is cached
        now = time.monotonic
        monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now() + 6))
        assert_problem(client.get("/v1/jobs"), 401, "invalid_api_key")


def test_expired_key_is_rejected_within_seconds(
    migrated_url: str, valkey: Valkey, store: Store, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expiring, lasting = store.keys.create("k", "acme", expires_in=3600), store.keys.create("k", "acme")
    with clients(migrated_url, valkey, expiring.secret, lasting.secret) as (client, other):
        assert client.get("/v1/jobs").status_code == 200
        execute(engine, "UPDATE api_keys SET expires_at = created_at - 1 WHERE id = :id", id=expiring.row.id)
        assert client.get("/v1/jobs").status_code == 200  # the key is cached
        now = time.monotonic
        monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now() + 6))
        for path in ("/v1/jobs", "/v1/models", "/metrics"):
            response = client.get(path)
            assert "has expired" in assert_problem(response, 401, "invalid_api_key")["detail"]
            assert response.headers["www-authenticate"] == "Bearer"
        assert other.get("/v1/jobs").status_code == 200


def test_unreachable_database_is_a_503_not_a_401(migrated_url: str, valkey: Valkey) -> None:
    with clients(migrated_url, valkey, "some-key-that-is-long", require_key=True) as (client,):
        lost = connect(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none")
        client.app.state.store = Store(lost)  # type: ignore[attr-defined]
        assert_problem(client.get("/v1/jobs"), 503, "database_unavailable")


def test_keys_commands_manage_keys(
    migrated_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setenv("TPO_DATABASE_URL", migrated_url)
    monkeypatch.chdir(tmp_path)

    def tpo(*words: str) -> Any:
        done = CliRunner().invoke(app, ["keys", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "no keys" in tpo("list")
    created = json.loads(tpo("create", "laptop", "--tenant", "acme", "--json"))
    assert store.keys.tenant_of(created["key"]) == "acme"
    plain = tpo("create", "desk").strip()
    assert store.keys.tenant_of(plain) == "default"
    listed = tpo("list", "--json")
    assert [key["name"] for key in json.loads(listed)] == ["laptop", "desk"]
    assert created["key"] not in listed
    assert created["key"][4:] not in tpo("list")
    assert "acme" in tpo("limit", "acme", "--jobs-in-flight", "0")
    with pytest.raises(QuotaExceededError):
        store.for_tenant("acme").jobs.submit(new_state(), limits=Limits(), max_attempts=1, model="m", reward_model="r")
    expiring = json.loads(tpo("create", "guest", "--expires-in", "90d", "--json"))
    assert expiring["expires_at"] == pytest.approx(expiring["created_at"] + 90 * 86_400, abs=1)
    assert (created["expires_at"], json.loads(tpo("list", "--json"))[-1]["expires_at"]) == (
        None,
        expiring["expires_at"],
    )
    assert datetime.fromtimestamp(expiring["expires_at"], UTC).strftime("%Y-%m-%d %H:%M") in tpo("list")
    assert created["id"] in tpo("revoke", created["id"])
    assert store.keys.tenant_of(created["key"]) is None
    wrong = CliRunner().invoke(app, ["keys", "revoke", "key_none"])
    assert (wrong.exit_code, "no key" in wrong.output) == (1, True)
    rejected = CliRunner().invoke(app, ["keys", "create", "k", "--tenant", "a b"])
    assert rejected.exit_code == 2
    for text in ("90", "d", "1.5h", "-1d", "0d", "1y", "99999w", " 1d"):
        rejected = CliRunner().invoke(app, ["keys", "create", "k", "--expires-in", text])
        assert (rejected.exit_code, "Traceback" in rejected.output) == (2, False), text
    assert len(store.keys.page()) == 3
