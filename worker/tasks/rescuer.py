"""Rescue jobs whose lease has expired, and notify workers of queued jobs."""

from tpo.broker import JobNotifier
from tpo.jobs.scheduling import Rules
from tpo.settings import Settings
from tpo.store import Store
from worker.guard import guarded
from worker.logs import log


class Rescuer:
    """Returns jobs of dead workers to the queue and repeats lost notifications."""

    def __init__(self, settings: Settings, store: Store, notifier: JobNotifier) -> None:
        self._settings = settings
        self._store = store
        self._notifier = notifier

    def sweep(self) -> None:
        """Run one round. The next round repeats whatever fails."""
        with guarded("jobs not rescued"):
            waiting = self._store.maintenance.sweep(
                renotify_seconds=self._settings.renotify_seconds,
                worker_retention_seconds=self._settings.worker_timeout_seconds,
                rules=Rules.from_settings(self._settings),
            )
            for job in waiting:
                self._notifier.notify_job(job.job_id, job.model)
                log.info("%s: workers notified", job.job_id)
