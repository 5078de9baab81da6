"""The courier: signs events and delivers them to webhooks (Standard Webhooks), on threads of its own.

A message rings for one delivery. The thread that takes it goes on with what else is due at the same webhook, so that
a fast receiver is not held to the pace of the bell; a slow one holds a few slots and never the sweeper.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import tpo
from tpo.backoff import backoff_seconds
from tpo.broker import JobNotifier
from tpo.settings import Settings
from tpo.store import Store
from tpo.webhooks.deliveries import ClaimedDelivery
from tpo.webhooks.http import NotSent, post, trusted
from tpo.webhooks.signing import payload, signed
from worker.guard import guarded
from worker.logs import log

RING_SECONDS = 1.0
"""How often deliveries are looked for: the most that an event waits on an idle courier."""

_ROW_SECONDS = 30.0
"""A thread stays so long with one webhook before others have their turn."""
_LONGEST_PAUSE = 4 * 3600.0
_RINGS = 100
_OK = range(200, 300)
_GONE = 410


class WebhookSender:
    """Delivers what is due."""

    def __init__(self, settings: Settings, store: Store, notifier: JobNotifier) -> None:
        self._settings = settings
        self._store = store
        self._notifier = notifier
        self._tls = trusted(settings.webhook_ca_file)
        self._slots = threading.BoundedSemaphore(settings.webhook_slots)
        self._claim_seconds = 3 * settings.webhook_timeout_seconds + 30  # the resolver has a time-out of its own

    def notify_due(self) -> None:
        """Ring for deliveries that are due. What fails now, the next round does."""
        with guarded("deliveries not notified"):
            for delivery_id in self._store.deliveries.due(_RINGS):
                self._notifier.notify_delivery(delivery_id)

    def deliver(self, delivery_id: str) -> None:
        """Deliver on a thread; where none is free, it is rung for again."""
        if self._slots.acquire(blocking=False):
            # A daemon: one that waits for a receiver does not keep the process, and what it held is sent again.
            threading.Thread(target=self._run, args=(delivery_id,), name=delivery_id, daemon=True).start()

    def _run(self, delivery_id: str) -> None:
        end = time.monotonic() + _ROW_SECONDS
        with _released(self._slots), guarded(f"{delivery_id} not delivered now"):
            parcel = self._store.deliveries.claim(delivery_id, self._claim_seconds)
            while parcel is not None:
                self._carry(parcel)
                more = time.monotonic() < end
                parcel = self._store.deliveries.claim_next(parcel.webhook_id, self._claim_seconds) if more else None

    def _carry(self, parcel: ClaimedDelivery) -> None:
        error = self._send(parcel)
        if error is None:
            self._store.deliveries.record_success(parcel)
        elif error == f"http_{_GONE}":
            log.info("%s is gone: switched off", parcel.webhook_id)
            self._store.deliveries.record_gone(parcel)
        else:
            delay = self._pause(parcel)
            told = "given up" if delay is None else f"again in {delay:.0f} s"
            log.info("%s not delivered to %s (%s), %s", parcel.delivery_id, parcel.webhook_id, error, told)
            self._store.deliveries.record_failure(parcel, error, delay)

    def _send(self, parcel: ClaimedDelivery) -> str | None:
        """Send it once. What went wrong, as a code."""
        body = payload(parcel)
        headers = {
            "content-type": "application/json",
            "user-agent": f"tpo/{tpo.__version__}",
            **signed(parcel.event_id, int(time.time()), body, parcel.secrets),
        }
        settings = self._settings
        try:
            status = post(
                parcel.url,
                body,
                headers,
                seconds=settings.webhook_timeout_seconds,
                allow_private=settings.webhook_allow_private,
                tls=self._tls,
            )
        except NotSent as error:
            return str(error)
        return None if status in _OK else f"http_{status}"

    def _pause(self, parcel: ClaimedDelivery) -> float | None:
        """Longer each time, and never the same for two; None where the event is too old to be tried again."""
        settings = self._settings
        first = settings.webhook_retry_seconds
        pause = backoff_seconds(parcel.attempt - 1, first=first, factor=4, longest=_LONGEST_PAUSE)
        return None if parcel.age + pause > settings.webhook_retry_hours * 3600 else pause


@contextmanager
def _released(slots: threading.Semaphore) -> Iterator[None]:
    """Give a slot back after the body, however it ends."""
    try:
        yield
    finally:
        slots.release()
