"""End a process whose model hangs."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from tpo.core.errors import StoreUnavailableError
from worker.drain import Drain
from worker.logs import log

CHECKS_IN_A_ROW = 6
"""Checks in a row that must agree. One check is not enough: a process that was suspended has only missed checks."""


def watch_models(
    healthy: Callable[[], bool], drain: Drain, deregister: Callable[[], None], every_seconds: float
) -> None:
    """Start a thread that ends this process if a model stays unhealthy for `every_seconds`, at once, like a crash.

    Its jobs wait for a result that cannot come. Handing them back would not count the attempt of a job that hangs
    every model. `deregister` removes this worker from the database.
    """

    def watch() -> None:
        unhealthy = 0
        while not drain.begun.wait(every_seconds / CHECKS_IN_A_ROW):
            # A model that died, rather than hung, fails its calls: the jobs end regularly before this fires.
            unhealthy = 0 if healthy() else unhealthy + 1
            if unhealthy >= CHECKS_IN_A_ROW:
                log.critical("a model is stuck; this process ends, and its leases expire")
                with suppress(StoreUnavailableError):
                    deregister()
                os._exit(1)

    threading.Thread(target=watch, name="watch-models", daemon=True).start()
