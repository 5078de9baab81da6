"""Rescue jobs whose lease has expired, and notify workers of waiting jobs."""

from tpo.broker import Doorbell
from tpo.core.errors import QueueUnavailable, StoreUnavailable, frames
from tpo.settings import Settings
from tpo.store import Store
from worker.job_runner import rules_of
from worker.logs import log


class Sweeper:
    """Brings back what was lost: jobs of dead workers, and doorbells."""

    def __init__(self, settings: Settings, store: Store, doorbell: Doorbell) -> None:
        self._settings = settings
        self._store = store
        self._doorbell = doorbell

    def sweep(self) -> None:
        """One round. What fails now, the next round does."""
        try:
            bells = self._store.maintenance.sweep(
                ring_again_seconds=self._settings.ring_again_seconds,
                forget_worker_seconds=2 * self._settings.lease_seconds,
                rules=rules_of(self._settings),
            )
            for bell in bells:
                self._doorbell.ring(bell.job_id, bell.model)
                log.info("%s rung for", bell.job_id)
        except StoreUnavailable as error:
            log.warning("not swept: %s", error)
        except QueueUnavailable as error:
            log.warning("not rung: %s", error)
        except Exception as error:
            log.error("not swept: %s", frames(error))
