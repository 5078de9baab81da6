"""End a process whose Celery consumer is stalled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from tpo.core.errors import BrokerUnavailableError
from worker.drain import Drain
from worker.model_watch import CHECKS_IN_A_ROW


class Consumer:
    """Knows when messages wait, a thread is free for one, and none comes.

    Celery's consumer can fall silent for ever after trouble with the broker (celery#10205). Its process lives, answers
    and renews leases, so that only this tells.
    """

    def __init__(self, threads: int, waiting: Callable[[], int]) -> None:
        self._threads = threads
        self._waiting = waiting
        self._lock = threading.Lock()
        self._busy = 0
        self._heard = 0
        self._heard_before = 0
        self._silent_looks = 0

    def track(self, task: Callable[..., None]) -> Callable[..., None]:
        """The same task, seen when it begins and when it ends."""

        @wraps(task)
        def seen(*args: Any) -> None:
            with self._working():
                task(*args)

        return seen

    def is_silent(self) -> bool:
        """Look once more: whether it has been silent for some looks in a row."""
        with self._lock:
            quiet = self._busy < self._threads and self._heard == self._heard_before
            self._heard_before = self._heard
        try:
            silent = quiet and self._waiting() > 0
        except BrokerUnavailableError:
            silent = False  # nobody hears anything from a broker that is away
        self._silent_looks = self._silent_looks + 1 if silent else 0
        return self._silent_looks >= CHECKS_IN_A_ROW

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self._heard += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


def watch_consumer(consumer: Consumer, drain: Drain, silent_seconds: float) -> None:
    """From now on, end this process when its consumer is silent for so long. Its jobs are handed back."""

    def watch() -> None:
        while not drain.begun.wait(silent_seconds / CHECKS_IN_A_ROW):
            if consumer.is_silent():
                drain.fail("messages wait, a thread is free, and the consumer takes none")

    threading.Thread(target=watch, name="watch-consumer", daemon=True).start()
