"""Webhooks over HTTPS, sent by real processes and by a sender in this one, and events of ended batches."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook

from testing.processes import System
from testing.waiting import eventually
from tests.integration.openai.test_batches import line
from tests.support.receiver import AUTHORITY, TLS, Receiver, receiving
from tests.support.webhooks import ANY_TARGET, finish, make_sender
from tpo.settings import Settings
from tpo.store import Store
from tpo.webhooks.tables import Delivery


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(tls=True) as receiver:
        yield receiver


@pytest.fixture
def sqlite_store(sqlite_system: System) -> Store:
    return sqlite_system.store


def delivery(store: Store, webhook_id: str) -> Delivery:
    (found,) = store.webhooks.deliveries_page(webhook_id, limit=2)
    return found


def test_certificate_of_a_configured_authority_is_trusted(sqlite_store: Store, receiver: Receiver) -> None:
    webhook = sqlite_store.webhooks.create(f"{receiver.url}/in", ["job.completed"])
    job_id = finish(sqlite_store)
    strict, trusting = make_sender(sqlite_store), make_sender(sqlite_store, webhook_ca_file=AUTHORITY)

    def rejected() -> bool:
        strict.send_due()
        return delivery(sqlite_store, webhook.row.id).last_error == "tls_failed"

    eventually(rejected, why="a certificate of an unknown authority should be rejected")
    assert receiver.received == []

    def arrived() -> bool:
        trusting.send_due()
        return delivery(sqlite_store, webhook.row.id).status == "delivered"

    eventually(arrived, why="the delivery should succeed")
    (got,) = receiver.received
    assert Webhook(webhook.secret).verify(got.body, got.headers)["data"]["id"] == job_id


def test_certificate_of_another_name_is_rejected(
    sqlite_store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(receiver.url.rpartition(":")[2])
    for host in ("hooks.example", "other.example"):
        sqlite_store.webhooks.create(f"https://{host}:{port}/", ["job.completed"])
    right, wrong = (w.id for w in reversed(sqlite_store.webhooks.page(limit=2)))
    real = socket.getaddrinfo

    def resolve(host: Any, *words: Any, **more: Any) -> Any:
        if str(host).endswith(".example"):
            return [(2, 1, 6, "", ("127.0.0.1", port))]
        return real(host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    finish(sqlite_store)
    sender = make_sender(sqlite_store, webhook_ca_file=AUTHORITY)

    def one_of_two_arrives() -> bool:
        sender.send_due()
        return (
            delivery(sqlite_store, right).status == "delivered"
            and delivery(sqlite_store, wrong).last_error == "tls_failed"
        )

    eventually(one_of_two_arrives, why="the right name should be delivered and the wrong one rejected")
    assert len(receiver.received) == 1


@pytest.mark.parametrize("content", [None, b"", b"no certificate", (TLS / "receiver.pem").read_bytes()[-200:]])
def test_invalid_ca_file_is_rejected_by_the_settings(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValidationError, match="TPO_WEBHOOK_CA_FILE"):
        Settings(webhook_ca_file=file)
    assert Settings(webhook_ca_file=AUTHORITY).webhook_ca_file == AUTHORITY


def test_events_of_ended_batches_are_delivered(sqlite_system: System, receiver: Receiver) -> None:
    system, store = sqlite_system, sqlite_system.store
    webhook = store.webhooks.create(
        receiver.url, [f"batch.{end}" for end in ("completed", "failed", "cancelled", "expired")]
    )

    def batch(text: str, seconds: float = 3600) -> str:
        file_id = store.files.begin("a", "batch")
        store.files.append_part(file_id, text.encode())
        store.files.complete(file_id)
        return store.batches.create(
            endpoint="/v1/responses", input_file_id=file_id, window="1h", seconds=seconds, metadata={}
        ).batch.id

    wanted = {
        "batch.completed": batch(line("a")),
        "batch.failed": batch("\n"),
        "batch.cancelled": batch(line("a")),
        "batch.expired": batch(line("a"), seconds=0),
    }
    store.batches.cancel(wanted["batch.cancelled"])
    system.environment["SSL_CERT_FILE"] = str(AUTHORITY)  # replaces the system's authorities
    system.worker(scripted_latency=0)
    system.maintenance(**ANY_TARGET, webhook_retry_seconds=0.2)
    eventually(lambda: len(receiver.received) >= 4, why="four events should be delivered")
    delivered = {}
    for request in receiver.received:
        Webhook(webhook.secret).verify(request.body, request.headers)
        event = json.loads(request.body)
        assert event.keys() == {"id", "object", "type", "created_at", "data"}
        delivered[event["type"]] = event["data"]["id"]
    assert delivered == wanted
