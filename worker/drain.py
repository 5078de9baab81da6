"""Shutdown of a worker: the drain begun by SIGTERM, Ctrl-C or a closed terminal, and the limit on its duration."""

import os
import signal
import threading
import time
from types import FrameType

from tpo.signals import stop_signals
from worker.celery.app import stop_consuming
from worker.logs import log


class Drain:
    """The two stages of a shutdown, visible to all threads."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        """First stage: jobs stop at their next checkpoint, and no job is claimed."""
        self.interrupting = threading.Event()
        """Second stage: running model calls stop between two tokens."""
        self.exit_code = 0

    def on_signals(self) -> None:
        """Begin the drain on any stop signal from now on. Call this in the main thread."""
        for number in stop_signals():
            signal.signal(number, self._begin)

    def fail(self, why: str) -> None:
        """Begin the drain because this process can no longer work. It exits with 1, so its supervisor restarts it."""
        log.critical("%s; this process ends", why)
        self.exit_code = 1
        self.begun.set()
        stop_consuming()

    def force_exit_after(self, seconds: float) -> None:
        """End the process `seconds` after the drain began, even if the broker or the database hangs."""

        def end() -> None:
            self.begun.wait()
            time.sleep(seconds)
            os._exit(self.exit_code)

        threading.Thread(target=end, name="end", daemon=True).start()

    def _begin(self, _number: int, _frame: FrameType | None) -> None:
        # Ignore further signals: a second one inside this handler would wait for a lock that the first one holds.
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)
        stop_consuming()
        self.begun.set()


def exit_on_signals() -> None:
    """Exit at once and without a traceback on any stop signal, until there is something to drain."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in stop_signals():
        signal.signal(number, leave)
