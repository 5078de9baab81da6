"""What the maintenance worker forgets: jobs, batches and files whose time is over, and names of old requests."""

import time
from collections.abc import Callable
from typing import TypeVar

from tpo.settings import Settings
from tpo.store import Store
from worker.guard import guarded
from worker.logs import log

PURGE_SECONDS = 60.0
_Age = TypeVar("_Age", float, float | None)
_DAY = 24 * 3600.0
_DELIVERIES_SECONDS = 7 * _DAY
_ROUND_SECONDS = 5.0
"""A round ends after so long, for the sweeper waits behind it; the next one goes on."""


class Cleaner:
    """Forgets in small batches, so that nobody waits long for the database. It never touches a job that lives."""

    def __init__(self, settings: Settings, store: Store) -> None:
        days = settings.retention_days
        self._retention = None if days is None else days * _DAY
        self._idempotency = settings.idempotency_hours * 3600
        self._store = store

    def purge(self) -> None:
        """Run one round. What fails now, the next round does."""
        with guarded("nothing purged"):
            if self._retention is not None:
                if jobs := _all_of(self._store.maintenance.purge, self._retention):
                    log.info("%d jobs purged: their retention is over", jobs)
                _all_of(self._store.batches.purge, self._retention)
            _all_of(self._store.files.purge, self._retention)
            _all_of(self._store.idempotency_keys.purge, self._idempotency)
            _all_of(self._store.deliveries.purge, _DELIVERIES_SECONDS)
            _all_of(self._store.maintenance.purge_last_claims, _DAY)


def _all_of(purge: Callable[[_Age], int], seconds: _Age) -> int:
    """Forget all that is older, a batch at a time, or as much as a round has time for. How many."""
    end = time.monotonic() + _ROUND_SECONDS
    forgotten = 0
    while (batch := purge(seconds)) and time.monotonic() < end:
        forgotten += batch
    return forgotten + batch
