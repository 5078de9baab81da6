"""Guard of background work: a failure is logged, and the next round repeats the work."""

from collections.abc import Iterator
from contextlib import contextmanager

from tpo.core.errors import BrokerUnavailableError, StatementFailedError, StoreUnavailableError, frames
from worker.logs import log


@contextmanager
def guarded(failure: str) -> Iterator[None]:
    """Log any exception of the body instead of raising it.

    An unreachable database or broker is a warning; every other exception, such as a refused statement, is an error with
    its stack frames. `failure` names the work that was not done.
    """
    try:
        yield
    except StatementFailedError as error:
        log.error("%s: %s %s", failure, error, frames(error))
    except (StoreUnavailableError, BrokerUnavailableError) as error:
        log.warning("%s: %s", failure, error)
    except Exception as error:
        log.error("%s: %s", failure, frames(error))
