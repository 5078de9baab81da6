"""Purge jobs, batches and files past their retention, and old idempotency keys, deliveries and claim records."""

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
_DELIVERY_RETENTION_SECONDS = 7 * _DAY
_ROUND_SECONDS = 5.0
"""Time limit for each table in a round, so that none waits for long; the next round continues."""

LONG_ROUND_SECONDS = 60.0
"""A round that takes longer is reported."""


class Cleaner:
    """Purges in small batches, so that no one waits long for the database. It never touches a live job."""

    def __init__(self, settings: Settings, store: Store) -> None:
        days = settings.retention_days
        self._retention = None if days is None else days * _DAY
        self._idempotency = settings.idempotency_hours * 3600
        self._store = store

    def purge(self) -> None:
        """Run one round. The next round repeats whatever fails."""
        with guarded("nothing purged"):
            if self._retention is not None:
                if jobs := _purge_older(self._store.maintenance.purge, self._retention):
                    log.info("%d jobs purged: their retention is over", jobs)
                _purge_older(self._store.batches.purge, self._retention)
            _purge_older(self._store.files.purge, self._retention)
            _purge_older(self._store.idempotency_keys.purge, self._idempotency)
            _purge_older(self._store.deliveries.purge, _DELIVERY_RETENTION_SECONDS)
            _purge_older(self._store.maintenance.purge_last_claims, _DAY)


def _purge_older(purge: Callable[[_Age], int], seconds: _Age) -> int:
    """Purge all rows older than `seconds`, a batch at a time, within _ROUND_SECONDS. Returns their number."""
    end = time.monotonic() + _ROUND_SECONDS
    purged = 0
    while (batch := purge(seconds)) and time.monotonic() < end:
        purged += batch
    return purged + batch
