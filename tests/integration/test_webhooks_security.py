"""Webhooks: rejected URLs, secrets, signatures and tenants."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from standardwebhooks import Webhook, WebhookVerificationError

from testing.jobs import execute
from tests.support.api_client import api_client, assert_problem
from tests.support.receiver import Received, Receiver
from tests.support.webhooks import (
    ANY_TARGET,
    create_webhook,
    deliveries,
    failed_delivery,
    finish,
    make_sender,
    settled_deliveries,
)
from tpo.store import Store

pytestmark = pytest.mark.usefixtures("joined_senders")


@pytest.fixture
def client(migrated_url: str) -> Iterator[TestClient]:
    with api_client(database_url=migrated_url, **ANY_TARGET) as client:
        yield client


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost:8000/",
        "https://10.1.2.3/x",
        "http://169.254.169.254/latest",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://100.64.0.1/",
        "http://0.0.0.0/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0/",
        "ftp://example.com/",
        "http://user:pw@example.com/",
        "http://example.com/#x",
        "http://example.com:99999/",
        "http:///x",
        "http://exa mple.com/",
        "http://example.com/\r\nx: y",
        "http://[1/",
        "https://192.0.0.192/",
        "https://[fec0::1]/",
        "https://192.88.99.1/",
        "https://[3fff::1]/",
        "https://[64:ff9b:1::808:808]/",
        "https://[2606:4700::1111%25eth0]/",
        "https://127%2e0.0.1/",
    ],
)
def test_invalid_and_private_urls_are_rejected(sqlite_client: TestClient, url: str) -> None:
    assert_problem(sqlite_client.post("/v1/webhooks", json={"url": url}), 422, "invalid_input", "url")
    webhook = create_webhook(sqlite_client, "https://93.184.215.14/")
    rejected = sqlite_client.patch(f"/v1/webhooks/{webhook['id']}", json={"url": url})
    assert_problem(rejected, 422, "invalid_input", "url")


@pytest.fixture
def sqlite_client(sqlite_template: Any, tmp_path: Any) -> Iterator[TestClient]:
    (tmp_path / "tpo.db").write_bytes(sqlite_template.read_bytes())
    with api_client(database_url=f"sqlite:///{tmp_path}/tpo.db", webhook_ports="any") as client:
        yield client


@pytest.mark.parametrize("after_update", [False, True])
@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.215.14", "10.0.0.1"], ["::ffff:192.168.0.1"]])
def test_name_with_a_private_address_is_not_called(
    sqlite_client: TestClient,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    after_update: bool,
    addresses: list[str],
) -> None:
    port = int(receiver.url.rpartition(":")[2])
    url = f"http://inside.example:{port}/"
    webhook = create_webhook(sqlite_client, "http://other.example/" if after_update else url)
    if after_update:
        assert sqlite_client.patch(f"/v1/webhooks/{webhook['id']}", json={"url": url}).json()["url"] == url
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: [(2, 1, 6, "", (a, port)) for a in addresses])
    store: Store = sqlite_client.app.state.store  # type: ignore[attr-defined]
    finish(store)
    failed_delivery(sqlite_client, webhook, make_sender(store, webhook_allow_private=False), "private_address")
    assert receiver.received == []


def test_checked_address_is_the_called_one(
    sqlite_client: TestClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(receiver.url.rpartition(":")[2])
    webhook = create_webhook(sqlite_client, f"http://rebinding.example:{port}/")
    store: Store = sqlite_client.app.state.store  # type: ignore[attr-defined]
    finish(store)
    queries: list[object] = []
    real = socket.getaddrinfo

    def resolve(host: Any, *words: Any, **more: Any) -> Any:
        if host != "rebinding.example":
            return real(host, *words, **more)  # a literal address
        queries.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if len(queries) == 1 else "203.0.113.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert settled_deliveries(sqlite_client, webhook, make_sender(store))[0]["status"] == "delivered"
    assert len(queries) == 1
    assert receiver.received[0].headers["host"] == f"rebinding.example:{port}"


def test_port_that_is_not_allowed_is_refused_and_not_called(
    sqlite_client: TestClient, receiver: Receiver, tmp_path: Path
) -> None:
    webhook = create_webhook(sqlite_client, "http://93.184.215.14:2525/")
    store: Store = sqlite_client.app.state.store  # type: ignore[attr-defined]
    finish(store)
    failed_delivery(sqlite_client, webhook, make_sender(store, webhook_ports="80,443"), "port_not_allowed")
    with api_client(database_url=f"sqlite:///{tmp_path}/tpo.db") as client:
        for method, path in (("POST", "/v1/webhooks"), ("PATCH", f"/v1/webhooks/{webhook['id']}")):
            refused = client.request(method, path, json={"url": "https://example.com:2525/"})
            detail = assert_problem(refused, 422, "invalid_input", "url")["detail"]
            assert "port 2525 is not allowed" in detail
            assert "80, 443, 8080, 8443" in detail
            assert "TPO_WEBHOOK_PORTS" in detail


def test_rotated_secret_signs_twice_until_it_expires(
    client: TestClient, store: Store, engine: Engine, receiver: Receiver
) -> None:
    webhook = create_webhook(client, receiver.url)
    path = f"/v1/webhooks/{webhook['id']}"
    sender = make_sender(store)

    def ping() -> Received:
        assert client.post(f"{path}/test").status_code == 202
        settled_deliveries(client, webhook, sender)
        return receiver.received[-1]

    new = client.post(f"{path}/rotate-secret").json()
    both = ping()
    assert both.headers["webhook-signature"].count("v1,") == 2
    for secret in (webhook["secret"], new["secret"]):
        assert Webhook(secret).verify(both.body, both.headers)["type"] == "webhook.test"
    execute(engine, "UPDATE webhooks SET old_secret_until = 1")
    one = ping()
    assert Webhook(new["secret"]).verify(one.body, one.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(webhook["secret"]).verify(one.body, one.headers)
    newest = client.post(f"{path}/rotate-secret", json={"keep_old_seconds": 0}).json()
    assert newest["old_secret_until"] is None
    assert ping().headers["webhook-signature"].count("v1,") == 1


def test_secrets_are_in_no_response_and_no_log(
    client: TestClient, store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    webhook = create_webhook(client, receiver.url)
    path = f"/v1/webhooks/{webhook['id']}"
    new = client.post(f"{path}/rotate-secret").json()
    receiver.answers = [500]
    finish(store)
    settled_deliveries(client, webhook, make_sender(store))
    seen = [client.get(a).text for a in (path, "/v1/webhooks", f"{path}/deliveries")]
    seen.append(client.patch(path, json={"events": ["job.failed"]}).text)
    for secret in (webhook["secret"], new["secret"]):
        assert not any(secret[6:] in text for text in [*seen, caplog.text])


def test_webhooks_belong_to_their_tenant(client: TestClient, store: Store, receiver: Receiver) -> None:
    mine = create_webhook(client, receiver.url)
    theirs = store.for_tenant("acme").webhooks.create(receiver.url, ["job.completed"]).row
    finish(store)
    assert list(store.for_tenant("acme").webhooks.deliveries_page(theirs.id, limit=9)) == []
    assert len(deliveries(client, mine)) == 1
    assert [w["id"] for w in client.get("/v1/webhooks").json()["data"]] == [mine["id"]]
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"enabled": False}),
        ("DELETE", "", None),
        ("GET", "/deliveries", None),
        ("POST", "/test", None),
        ("POST", "/rotate-secret", {}),
    ):
        responses = [client.request(method, f"/v1/webhooks/{i}{path}", json=body) for i in (theirs.id, "wh_none")]
        for response in responses:
            assert_problem(response, 404, "webhook_not_found")
    assert store.for_tenant("acme").webhooks.get(theirs.id).enabled
