"""Webhooks: created over HTTP and delivered to a real receiver, on both databases where rows matter."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from standardwebhooks import Webhook, WebhookVerificationError

from testing.jobs import claim, create, execute
from testing.processes import System
from testing.waiting import HANG_SECONDS, eventually
from tests.support.api_client import api_client, assert_problem
from tests.support.receiver import Received, Receiver, receiving
from tpo.broker import JobNotifier
from tpo.jobs.outcomes import Outcome
from tpo.settings import Settings
from tpo.store import Store
from worker.tasks.webhooks import WebhookSender


class DirectNotifier(JobNotifier):
    """Delivers directly, without a broker."""

    sender: WebhookSender

    def notify_delivery(self, delivery_id: str) -> None:
        self.sender.deliver(delivery_id)


def make_sender(store: Store, **settings: Any) -> WebhookSender:
    values = {"webhook_allow_private": True, "webhook_retry_seconds": 0.02, "webhook_timeout_seconds": 5, **settings}
    notifier = DirectNotifier("redis://127.0.0.1:1/0")
    notifier.sender = WebhookSender(Settings(**values), store, notifier)
    return notifier.sender


@pytest.fixture(autouse=True)
def _join_senders(request: pytest.FixtureRequest) -> Iterator[None]:
    """Join the threads of senders before the test's database is removed."""
    for name in ("store", "sqlite_client"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("whd_"):
            thread.join(HANG_SECONDS)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def client(migrated_url: str) -> Iterator[TestClient]:
    with api_client(database_url=migrated_url, webhook_allow_private=True) as client:
        yield client


def create_webhook(client: TestClient, url: str, **options: Any) -> dict[str, Any]:
    response = client.post("/v1/webhooks", json={"url": url, **options})
    assert response.status_code == 201, response.text
    webhook: dict[str, Any] = response.json()
    return webhook


def finish(store: Store, status: Any = "completed") -> str:
    job_id = create(store)
    store.leases.finish(claim(store, job_id)[0], Outcome(status))
    return job_id


def deliveries(client: TestClient, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    return data


def settled_deliveries(client: TestClient, webhook: dict[str, Any], sender: WebhookSender) -> list[dict[str, Any]]:
    """Wait until no delivery is pending, and return them."""

    def settled() -> list[dict[str, Any]] | None:
        sender.notify_due()
        found = deliveries(client, webhook)
        return found if all(d["status"] in ("delivered", "failed") for d in found) else None

    return eventually(settled, why="all deliveries should be settled")


def failed_delivery(client: TestClient, webhook: dict[str, Any], sender: WebhookSender, error: str) -> dict[str, Any]:
    """Wait until the only delivery has failed with this error, and return it."""

    def failed() -> dict[str, Any] | None:
        sender.notify_due()
        (found,) = deliveries(client, webhook)
        return found if found["last_error"] == error else None

    return eventually(failed, why=f"the delivery should fail with {error}")


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
    store.maintenance.sweep(renotify_seconds=60, forget_worker_seconds=60)
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
        sender.notify_due()
        sender.notify_due()
        assert {d["last_error"] for d in deliveries(client, slow)} == {None}, "notify_due waited for a receiver"
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
    with api_client(database_url=f"sqlite:///{tmp_path}/tpo.db") as client:
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
    settings = {"webhook_allow_private": "true", "webhook_retry_seconds": 0.2, "webhook_timeout_seconds": 5}
    webhook = system.store.webhooks.create(receiver.url, ["job.completed", "job.cancelled"])
    receiver.answers = [500] * 3
    receiver.hangs.set()
    first = system.maintenance(**settings)
    job_id = system.submit(ring=False)
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
