"""Celery's beat, for the schedule of maintenance tasks."""

from celery import Celery
from celery.beat import ScheduleEntry, Scheduler, Service
from kombu.connection import Connection
from kombu.messaging import Producer

from tpo.broker import unavailable
from tpo.core.errors import frames
from worker.celery.app import reconnect
from worker.drain import Drain
from worker.logs import log


def beat(app: Celery, drain: Drain) -> None:
    """Send the app's scheduled messages until the process ends. If beat itself ends, begin a failing drain."""
    try:
        Service(app, max_interval=1, scheduler_cls=_Scheduler, remote_control=False).start()
    except Exception as error:
        drain.fail(f"beat has ended: {frames(error)}")


class _Scheduler(Scheduler):  # type: ignore[misc]
    """Celery's in-memory scheduler; it logs a broker outage in one line and retries soon."""

    def apply_entry(self, entry: ScheduleEntry, producer: Producer | None = None) -> None:
        try:
            self.apply_async(entry, producer=producer, advance=False, retry=False)
        except Exception as error:
            log.warning("%s not sent: %s", entry.name, unavailable(error))

    def _ensure_connected(self) -> Connection:
        return reconnect(self.connection)
