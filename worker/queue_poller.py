"""Look for waiting jobs in the database when no message arrives, so that a silent broker delays jobs but stops none."""

import threading
from collections.abc import Callable

from worker.celery.consumer_watch import ConsumerWatch
from worker.drain import Drain
from worker.guard import guarded
from worker.logs import log


class QueuePoller:
    """Runs waiting jobs on threads of its own while slots are free and the consumer receives nothing.

    A connection to the broker may be frozen without an error, for as long as the network likes. Nothing on it can
    report that, but the database holds every job. A polled job never waits for the broker.

    After a check that finds a job, or after a polled job, a message is sent. If the broker can be reached, a consumer
    that works receives it, and `watch_consumer` ends the process of one that does not.
    """

    def __init__(
        self,
        consumer: ConsumerWatch,
        drain: Drain,
        next_waiting: Callable[[], str | None],
        run_waiting_job: Callable[[Callable[[], None]], str | None],
        notify: Callable[[str], None],
        silent_seconds: float,
    ) -> None:
        self._consumer = consumer
        self._drain = drain
        self._next_waiting = next_waiting
        self._run_waiting_job = run_waiting_job
        self._notify = notify
        self._silent_seconds = silent_seconds
        self._received = 0
        self._polled: str | None = None

    def start(self) -> None:
        """Start the polling thread."""
        threading.Thread(target=self._poll, name="queue-poller", daemon=True).start()

    def check(self) -> None:
        """Run a waiting job if no message has arrived since the last check."""
        received = self._consumer.received
        silent, self._received = received == self._received, received
        if silent:
            with guarded("the queue was not checked"):
                if job_id := self._next_waiting():
                    log.info("a job waits and no message arrives: it is taken from the database")
                    self._fill_slot()
                polled, self._polled = self._polled, None
                if job_id := job_id or polled:
                    self._notify(job_id)

    def _poll(self) -> None:
        while not self._drain.begun.wait(self._silent_seconds):
            self.check()

    def _fill_slot(self) -> None:
        """Start a thread that runs jobs until none waits, if a slot is free."""
        if self._consumer.reserve_slot():
            threading.Thread(target=self._run_jobs, name="polled-job", daemon=True).start()

    def _run_jobs(self) -> None:
        try:
            with guarded("a polled job was not run"):
                while job_id := self._run_waiting_job(self._fill_slot):
                    self._polled = job_id
        finally:
            self._consumer.release_slot()
