"""Keep background work going: a failure is logged, and the next round repeats the work."""

from collections.abc import Iterator
from contextlib import contextmanager

from tpo.core.errors import BrokerUnavailableError, StoreUnavailableError, frames
from worker.logs import log


@contextmanager
def guarded(failure: str) -> Iterator[None]:
    """Log what ends the body: a database or broker that is away as a warning, everything else with its frames.

    `failure` says what was not done. No exception leaves the body.
    """
    try:
        yield
    except (StoreUnavailableError, BrokerUnavailableError) as error:
        log.warning("%s: %s", failure, error)
    except Exception as error:
        log.error("%s: %s", failure, frames(error))
