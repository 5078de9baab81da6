"""How a worker ends: what SIGTERM, Ctrl-C and a closed terminal set off, and the bound on the time that it takes."""

import os
import signal
import threading
import time
from types import FrameType

from tpo.signals import stop_signals
from worker.celery.app import stop_consuming
from worker.logs import log


class Drain:
    """The two stages of an end, for all threads to look at."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        """Jobs stop at their next checkpoint, and none is claimed."""
        self.interrupting = threading.Event()
        """Running model calls stop between two tokens."""
        self.exit_code = 0

    def on_signals(self) -> None:
        """From now on, what asks for the end begins the drain. To be called in the main thread."""
        for number in stop_signals():
            signal.signal(number, self._begin)

    def fail(self, why: str) -> None:
        """Begin the drain because this process is of no more use; it ends with 1, so that it is started anew."""
        log.critical("%s; this process ends", why)
        self.exit_code = 1
        self.begun.set()
        stop_consuming()

    def force_exit_after(self, seconds: float) -> None:
        """End the process so long after the drain began, even where the broker or the database hangs."""

        def end() -> None:
            self.begun.wait()
            time.sleep(seconds)
            os._exit(self.exit_code)

        threading.Thread(target=end, name="end", daemon=True).start()

    def _begin(self, _number: int, _frame: FrameType | None) -> None:
        # Once is enough; a second signal inside this handler would wait for the lock that the first one holds.
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)
        stop_consuming()
        self.begun.set()


def exit_on_signals() -> None:
    """Until there is something to drain, what asks for the end ends the process at once and without a trace."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in stop_signals():
        signal.signal(number, leave)
