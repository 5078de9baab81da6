"""Create webhooks and send their deliveries from this process."""

from typing import Any

from fastapi.testclient import TestClient

from testing.jobs import claim, create
from testing.waiting import eventually
from tpo.jobs.outcomes import Outcome
from tpo.settings import Settings
from tpo.store import Store
from worker.tasks.webhooks import WebhookSender

ANY_TARGET = {"webhook_allow_private": "true", "webhook_ports": "any"}
"""Settings with which the receivers of tests may be called: on this machine, on any free port."""


def make_sender(store: Store, **settings: Any) -> WebhookSender:
    """Create a sender with short delays that may call any target."""
    values = {**ANY_TARGET, "webhook_retry_seconds": 0.02, "webhook_timeout_seconds": 5, **settings}
    return WebhookSender(Settings(**values), store)


def create_webhook(client: TestClient, url: str, **options: Any) -> dict[str, Any]:
    """Create a webhook over HTTP and return it."""
    response = client.post("/v1/webhooks", json={"url": url, **options})
    assert response.status_code == 201, response.text
    webhook: dict[str, Any] = response.json()
    return webhook


def finish(store: Store, status: Any = "completed") -> str:
    """Create a job, end it with this status, and return its id."""
    job_id = create(store)
    store.leases.finish(claim(store, job_id)[0], Outcome(status))
    return job_id


def deliveries(client: TestClient, webhook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the deliveries of a webhook."""
    data: list[dict[str, Any]] = client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["data"]
    return data


def settled_deliveries(client: TestClient, webhook: dict[str, Any], sender: WebhookSender) -> list[dict[str, Any]]:
    """Wait until no delivery is pending, and return them."""

    def settled() -> list[dict[str, Any]] | None:
        sender.send_due()
        found = deliveries(client, webhook)
        return found if all(d["status"] in ("delivered", "failed") for d in found) else None

    return eventually(settled, why="all deliveries should be settled")


def failed_delivery(client: TestClient, webhook: dict[str, Any], sender: WebhookSender, error: str) -> dict[str, Any]:
    """Wait until the only delivery has failed with this error, and return it."""

    def failed() -> dict[str, Any] | None:
        sender.send_due()
        (found,) = deliveries(client, webhook)
        return found if found["last_error"] == error else None

    return eventually(failed, why=f"the delivery should fail with {error}")
