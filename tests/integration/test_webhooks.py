"""Webhooks: created over HTTP and delivered to a real receiver, on both databases where rows matter."""

import json
from collections.abc import Iterator

import openai
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from standardwebhooks import Webhook, WebhookVerificationError

from testing.jobs import claim, create
from testing.processes import System
from testing.waiting import eventually
from tests.support.api_client import api_client, assert_problem
from tests.support.receiver import Receiver, receiving
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


def test_event_is_delivered_and_verified_by_both_libraries(
    client: TestClient, store: Store, receiver: Receiver
) -> None:
    webhook = create_webhook(client, f"{receiver.url}/in?a=b")
    job_id = finish(store)
    (delivery,) = settled_deliveries(client, webhook, make_sender(store))
    assert (delivery["type"], delivery["data_id"], delivery["attempt"]) == ("job.completed", job_id, 1)
    (got,) = receiver.received
    body = Webhook(webhook["secret"]).verify(got.body, got.headers)
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert body == {
        "id": got.headers["webhook-id"],
        "object": "event",
        "type": "job.completed",
        "created_at": delivery["created_at"],
        "data": {"id": job_id},
    }
    assert delivery["created_at"] >= job["completed_at"]
    unwrapped = openai.OpenAI(api_key="-", webhook_secret=webhook["secret"]).webhooks.unwrap(got.body, got.headers)
    assert (unwrapped.id, unwrapped.type, unwrapped.data.id) == (body["id"], "job.completed", job_id)  # type: ignore[union-attr]
    with pytest.raises(WebhookVerificationError):
        Webhook(webhook["secret"]).verify(got.body + b" ", got.headers)


def test_every_terminal_status_is_delivered_once(
    client: TestClient, store: Store, engine: Engine, receiver: Receiver
) -> None:

    webhook = create_webhook(client, receiver.url)
    for status in ("completed", "failed", "incomplete", "expired"):
        finish(store, status)
    store.jobs.cancel(create(store))
    killed = create(store, max_attempts=1)
    claim(store, killed, seconds=-1)
    store.maintenance.sweep(renotify_seconds=60, worker_retention_seconds=60)
    store.jobs.cancel(killed)
    delivered = [d["type"] for d in settled_deliveries(client, webhook, make_sender(store))]
    ended = ["cancelled", "completed", "expired", "failed", "failed", "incomplete"]
    assert sorted(delivered) == [f"job.{status}" for status in ended]
    assert store.deliveries.purge(0) == 6
    assert deliveries(client, webhook) == []


def test_failed_delivery_is_retried_with_the_same_id(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    receiver.answers = [500, 302, 404]
    finish(store)
    (delivery,) = settled_deliveries(client, webhook, make_sender(store))
    assert (delivery["status"], delivery["attempt"], delivery["last_error"]) == ("delivered", 4, None)
    assert len(receiver.received) == 4
    assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
    assert len({got.body for got in receiver.received}) == 1
    for got in receiver.received:
        Webhook(webhook["secret"]).verify(got.body, got.headers)


def test_old_delivery_is_given_up(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    receiver.answers = [500] * 100
    finish(store)
    (delivery,) = settled_deliveries(client, webhook, make_sender(store, webhook_retry_hours=0.3 / 3600))
    assert (delivery["status"], delivery["last_error"]) == ("failed", "http_500")
    assert client.get(f"/v1/webhooks/{webhook['id']}").json()["enabled"]


def test_redirect_is_not_followed(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    receiver.answers = [307]
    finish(store)
    delivery = failed_delivery(client, webhook, make_sender(store, webhook_retry_seconds=60), "http_307")
    assert (delivery["status"], len(receiver.received)) == ("pending", 1)


def test_hanging_receiver_does_not_block_others(client: TestClient, store: Store, receiver: Receiver) -> None:
    with receiving() as other:
        slow = create_webhook(client, receiver.url)
        receiver.hangs.set()
        for _ in range(6):
            finish(store)
        sender = make_sender(store, webhook_slots=6, webhook_timeout_seconds=60, webhook_retry_seconds=60)
        sender.send_due()
        sender.send_due()
        assert {d["last_error"] for d in deliveries(client, slow)} == {None}, "send_due waited for a receiver"
        eventually(lambda: len(receiver.received) == 4, why="one webhook should have four concurrent deliveries")
        fast = create_webhook(client, other.url)
        finish(store)
        assert [d["status"] for d in settled_deliveries(client, fast, sender)] == ["delivered"]
        assert not any(d["status"] in ("delivered", "failed") for d in deliveries(client, slow))
        receiver.released.set()


def test_hanging_receiver_times_out(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    receiver.hangs.set()
    finish(store)
    failed_delivery(
        client, webhook, make_sender(store, webhook_timeout_seconds=0.5, webhook_retry_seconds=60), "timeout"
    )
    receiver.released.set()


def test_status_410_disables_the_webhook(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    receiver.answers = [410]
    finish(store)
    (delivery,) = settled_deliveries(client, webhook, make_sender(store))
    assert (delivery["status"], delivery["last_error"]) == ("failed", "http_410")
    path = f"/v1/webhooks/{webhook['id']}"
    off = client.get(path).json()
    assert (off["enabled"], off["disabled_reason"]) == (False, "gone")
    assert_problem(client.post(f"{path}/test"), 409, "conflict")
    finish(store)
    assert len(deliveries(client, webhook)) == 1
    on = client.patch(path, json={"enabled": True}).json()
    assert (on["enabled"], on["disabled_reason"]) == (True, None)
    finish(store)
    assert len(settled_deliveries(client, webhook, make_sender(store))) == 2


def test_only_subscribed_events_are_delivered(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url, events=["job.failed", "response.completed", "response.incomplete"])
    completed, failed, expired = (finish(store, s) for s in ("completed", "failed", "expired"))
    delivered = {(d["type"], d["data_id"]) for d in settled_deliveries(client, webhook, make_sender(store))}
    assert delivered == {
        ("response.completed", completed.replace("job_", "resp_")),
        ("job.failed", failed),
        ("response.incomplete", expired.replace("job_", "resp_")),
    }
    rejected = client.post("/v1/webhooks", json={"url": receiver.url, "events": ["x"]})
    assert_problem(rejected, 422, "invalid_input", "events[0]")


def test_disable_and_delete_end_deliveries(client: TestClient, store: Store, receiver: Receiver) -> None:
    webhook = create_webhook(client, receiver.url)
    path = f"/v1/webhooks/{webhook['id']}"
    finish(store)
    off = client.patch(path, json={"enabled": False}).json()
    assert (off["enabled"], off["disabled_reason"]) == (False, "by_owner")
    assert [(d["status"], d["last_error"]) for d in deliveries(client, webhook)] == [("failed", "webhook_off")]
    assert client.delete(path).json() == {"id": webhook["id"], "object": "webhook", "deleted": True}
    assert_problem(client.get(path), 404, "webhook_not_found")
    finish(store)
    for _ in range(20):
        create_webhook(client, receiver.url)
    assert_problem(client.post("/v1/webhooks", json={"url": receiver.url}), 409, "conflict")


def test_delivery_survives_a_killed_maintenance_worker(system: System, receiver: Receiver) -> None:
    settings = {**ANY_TARGET, "webhook_retry_seconds": 0.2, "webhook_timeout_seconds": 5}
    webhook = system.store.webhooks.create(receiver.url, ["job.completed", "job.cancelled"])
    receiver.answers = [500] * 3
    receiver.hangs.set()
    first = system.maintenance(**settings)
    job_id = system.submit(notify=False)
    system.store.jobs.cancel(job_id)
    eventually(lambda: receiver.received, why="the first attempt should arrive")
    first.kill()
    receiver.hangs.clear()
    receiver.released.set()
    with system.engine.begin() as connection:  # deliveries claimed by the killed process are due immediately
        connection.exec_driver_sql("UPDATE deliveries SET next_attempt_at = 0")
    second = system.maintenance(**settings)

    def arrived() -> bool:
        (delivery,) = system.store.webhooks.deliveries_page(webhook.row.id, limit=2)
        return delivery.status == "delivered"

    eventually(arrived, why="the delivery should succeed")
    assert len(receiver.received) == 5
    assert {json.loads(got.body)["data"]["id"] for got in receiver.received} == {job_id}
    assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
    assert second.stop() == 0
    assert webhook.secret not in second.output
