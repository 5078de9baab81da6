"""What a process looks after in itself: a consumer that hears nothing any more, and a model that is stuck.

Both look alive from outside, and keep their jobs from others. The way out is the same: this process ends with 1, and is
started anew.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from tpo.errors import QueueUnavailable, StoreUnavailable
from worker.drain import Drain
from worker.logs import log

_LOOKS = 6
"""So many looks in a row must find the same: a process that was stopped for a while has missed looks, no more."""


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

    def hears(self, task: Callable[..., None]) -> Callable[..., None]:
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
        except QueueUnavailable:
            silent = False  # nobody hears anything from a broker that is away
        self._silent_looks = self._silent_looks + 1 if silent else 0
        return self._silent_looks >= _LOOKS

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
        while not drain.begun.wait(silent_seconds / _LOOKS):
            if consumer.is_silent():
                drain.fail("messages wait, a thread is free, and the consumer takes none")

    threading.Thread(target=watch, name="watch-consumer", daemon=True).start()


def watch_models(healthy: Callable[[], bool], drain: Drain, leave: Callable[[], None], every_seconds: float) -> None:
    """From now on, end this process when a model stays unhealthy: at once, as a crash would.

    Its jobs wait for nothing that can come, and handing them back would not count the attempt of the one that hangs
    every model. `leave` tells the database that this worker takes no more jobs.
    """

    def watch() -> None:
        unhealthy = 0
        while not drain.begun.wait(every_seconds / _LOOKS):
            # A model that has died fails its calls, and the jobs end as they should in the meantime.
            unhealthy = 0 if healthy() else unhealthy + 1
            if unhealthy >= _LOOKS:
                log.critical("a model is stuck; this process ends, and its leases run out")
                with suppress(StoreUnavailable):
                    leave()
                os._exit(1)

    threading.Thread(target=watch, name="watch-models", daemon=True).start()
