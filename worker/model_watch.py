"""End a process whose model hangs."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from tpo.core.errors import StoreUnavailableError
from worker.drain import Drain
from worker.logs import log

CHECKS_IN_A_ROW = 6
"""So many looks in a row must find the same: a process that was stopped for a while has missed looks, no more."""


def watch_models(healthy: Callable[[], bool], drain: Drain, leave: Callable[[], None], every_seconds: float) -> None:
    """From now on, end this process when a model stays unhealthy: at once, as a crash would.

    Its jobs wait for nothing that can come, and handing them back would not count the attempt of the one that hangs
    every model. `leave` tells the database that this worker takes no more jobs.
    """

    def watch() -> None:
        unhealthy = 0
        while not drain.begun.wait(every_seconds / CHECKS_IN_A_ROW):
            # A model that has died fails its calls, and the jobs end as they should in the meantime.
            unhealthy = 0 if healthy() else unhealthy + 1
            if unhealthy >= CHECKS_IN_A_ROW:
                log.critical("a model is stuck; this process ends, and its leases run out")
                with suppress(StoreUnavailableError):
                    leave()
                os._exit(1)

    threading.Thread(target=watch, name="watch-models", daemon=True).start()
