"""End a process whose Celery consumer is stalled."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from tpo.core.errors import BrokerUnavailableError
from worker.drain import Drain
from worker.model_watch import CHECKS_IN_A_ROW


class ConsumerWatch:
    """Detects a stalled Celery consumer: messages are queued, a thread is idle, and nothing arrives.

    Celery's consumer can stop consuming for good after trouble with the broker (celery#10205). Its process lives,
    answers pings and renews leases, so nothing else detects it.

    It also counts the busy slots, because jobs are taken from the database as well (`worker.queue_poller`).
    """

    def __init__(self, threads: int, pending_count: Callable[[], int]) -> None:
        self._threads = threads
        self._pending_count = pending_count
        self._lock = threading.Lock()
        self._busy = 0
        self._received = 0
        self._received_before = 0
        self._silent_checks = 0

    def track(self, task: Callable[..., None]) -> Callable[..., None]:
        """Return the same task, counted when it begins and when it ends.

        It does nothing if polled jobs occupy all slots: the job stays queued, and each of them looks for the next one.
        """

        @wraps(task)
        def tracked(*args: Any) -> None:
            with self._lock:
                self._received += 1
            if self.reserve_slot():
                try:
                    task(*args)
                finally:
                    self.release_slot()

        return tracked

    @property
    def received(self) -> int:
        """The number of messages received so far."""
        with self._lock:
            return self._received

    def reserve_slot(self) -> bool:
        """Occupy a slot; return False if none is free."""
        with self._lock:
            free = self._busy < self._threads
            self._busy += free
            return free

    def release_slot(self) -> None:
        """Free a slot."""
        with self._lock:
            self._busy -= 1

    def is_silent(self) -> bool:
        """Check once more, and return True if the consumer was silent in the last CHECKS_IN_A_ROW checks."""
        with self._lock:
            quiet = self._busy < self._threads and self._received == self._received_before
            self._received_before = self._received
        try:
            silent = quiet and self._pending_count() > 0
        except BrokerUnavailableError:
            silent = False  # no consumer can receive from an unreachable broker
        self._silent_checks = self._silent_checks + 1 if silent else 0
        return self._silent_checks >= CHECKS_IN_A_ROW


def watch_consumer(consumer: ConsumerWatch, drain: Drain, silent_seconds: float) -> None:
    """Start a thread that ends this process when its consumer is silent for `silent_seconds`.

    The process drains: it hands its jobs back.
    """

    def watch() -> None:
        while not drain.begun.wait(silent_seconds / CHECKS_IN_A_ROW):
            if consumer.is_silent():
                drain.fail("messages are queued, a thread is idle, and the consumer takes none")

    threading.Thread(target=watch, name="watch-consumer", daemon=True).start()
