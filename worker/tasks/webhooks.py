"""The webhook sender: signs events and delivers them (Standard Webhooks) on its own threads.

Each thread begins with one delivery and continues with other due deliveries of the same webhook, so a fast receiver is
not limited by the interval of the rounds. A slow receiver occupies a few slots and delays nothing else.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import tpo
from tpo.backoff import backoff_seconds
from tpo.settings import Settings
from tpo.store import Store
from tpo.webhooks.addresses import AllowedTargets
from tpo.webhooks.deliveries import ClaimedDelivery
from tpo.webhooks.http import NotSent, post, tls_context
from tpo.webhooks.signing import payload, signature_headers
from worker.guard import guarded
from worker.logs import log

SEND_WEBHOOKS_SECONDS = 1.0
"""Interval between two searches for due deliveries: the longest that an event waits if the sender is idle."""

_SECONDS_PER_WEBHOOK = 30.0
"""Time that a thread spends on one webhook before it is free for others."""
_LONGEST_PAUSE = 4 * 3600.0
_DELIVERIES_PER_ROUND = 100
_OK = range(200, 300)
_GONE = 410


class WebhookSender:
    """Sends the deliveries that are due."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._tls = tls_context(settings.webhook_ca_file)
        self._slots = threading.BoundedSemaphore(settings.webhook_slots)
        self._claim_seconds = 3 * settings.webhook_timeout_seconds + 30  # the DNS resolver has a separate timeout

    def send_due(self) -> None:
        """Begin to send each due delivery, on a thread. The next round repeats whatever fails."""
        with guarded("deliveries not sent"):
            for delivery_id in self._store.deliveries.due(_DELIVERIES_PER_ROUND):
                self._deliver_on_thread(delivery_id)

    def _deliver_on_thread(self, delivery_id: str) -> None:
        """Deliver on a thread. If no slot is free, a later round does it."""
        if self._slots.acquire(blocking=False):
            # A daemon thread: waiting for a receiver must not keep the process alive, and its delivery is sent again.
            threading.Thread(target=self._run, args=(delivery_id,), name=delivery_id, daemon=True).start()

    def _run(self, delivery_id: str) -> None:
        end = time.monotonic() + _SECONDS_PER_WEBHOOK
        with _released(self._slots), guarded(f"{delivery_id} not delivered now"):
            delivery = self._store.deliveries.claim(delivery_id, self._claim_seconds)
            while delivery is not None:
                self._deliver(delivery)
                more = time.monotonic() < end
                delivery = self._store.deliveries.claim_next(delivery.webhook_id, self._claim_seconds) if more else None

    def _deliver(self, delivery: ClaimedDelivery) -> None:
        error = self._send(delivery)
        if error is None:
            self._store.deliveries.record_success(delivery)
        elif error == f"http_{_GONE}":
            log.info("%s responded with 410 Gone: disabled", delivery.webhook_id)
            self._store.deliveries.record_gone(delivery)
        else:
            delay = self._retry_delay(delivery)
            next_attempt = "given up" if delay is None else f"retry in {delay:.0f} s"
            log.info("%s not delivered to %s (%s), %s", delivery.delivery_id, delivery.webhook_id, error, next_attempt)
            self._store.deliveries.record_failure(delivery, error, delay)

    def _send(self, delivery: ClaimedDelivery) -> str | None:
        """Send a delivery once. Returns an error code, or None on success."""
        body = payload(delivery)
        headers = {
            "content-type": "application/json",
            "user-agent": f"tpo/{tpo.__version__}",
            **signature_headers(delivery.event_id, int(delivery.created_at + delivery.age), body, delivery.secrets),
        }
        settings = self._settings
        try:
            status = post(
                delivery.url,
                body,
                headers,
                seconds=settings.webhook_timeout_seconds,
                allowed=AllowedTargets.from_settings(settings),
                tls=self._tls,
            )
        except NotSent as error:
            return str(error)
        return None if status in _OK else f"http_{status}"

    def _retry_delay(self, delivery: ClaimedDelivery) -> float | None:
        """Return the pause before the next attempt in seconds, or None if the event is too old to retry.

        The pause grows with each attempt and has jitter.
        """
        settings = self._settings
        first = settings.webhook_retry_seconds
        pause = backoff_seconds(delivery.attempt - 1, first=first, factor=4, longest=_LONGEST_PAUSE)
        return None if delivery.age + pause > settings.webhook_retry_hours * 3600 else pause


@contextmanager
def _released(slots: threading.Semaphore) -> Iterator[None]:
    """Release a slot after the body, even if the body raises."""
    try:
        yield
    finally:
        slots.release()
