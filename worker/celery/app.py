"""The Celery app and its settings: the broker carries wake-ups only, and tasks run on threads."""

import time
from collections.abc import Callable

from celery import Celery
from celery.worker import WorkController
from celery.worker import state as celery_state
from celery.worker.consumer import Consumer
from celery.worker.control import Panel
from celery.worker.state import maybe_shutdown
from kombu.connection import Connection

from tpo.broker import BROKER_TRANSPORT_OPTIONS, unavailable
from tpo.settings import Settings
from worker.logs import log

_REFUSED_RETRY_SECONDS = 1.0

_REMOTE_COMMANDS = frozenset(
    ("ping", "stats", "active_queues", "registered", "scheduled", "active", "reserved", "revoked", "enable_events")
)
"""What Flower and the health check send. All others are refused: anyone who reaches the broker could send them."""


def make_app(settings: Settings, queue: str, **more: object) -> Celery:
    """Return a Celery app whose workers consume one queue."""
    app = Celery("tpo", broker=settings.broker_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        # Acknowledge early: the lease in the database brings a lost job back. With late acknowledgement, Celery 5.7.0
        # stops consuming when the broker goes away under a busy worker.
        task_acks_late=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=queue,
        task_send_sent_event=True,
        worker_send_task_events=True,
        worker_pool="threads",
        # A wake-up must not stay reserved by a busy worker while another worker is idle.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_prefetch_count_reduction=False,
        # Cancels only late-acknowledged tasks, and there are none; if unset, Celery warns at each reconnection.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Also retry when the broker answers but refuses, for example because its memory is full.
        broker_channel_error_retry=True,
        broker_transport_options=BROKER_TRANSPORT_OPTIONS,
        **more,
    )
    return app


def controller(app: Celery, *, name: str, threads: int, on_ready: Callable[[], None]) -> WorkController:
    """Return a worker that consumes after `start()`. `on_ready` is called when it begins to consume."""
    for command in Panel.data.keys() - _REMOTE_COMMANDS:
        Panel.data[command] = _refuse_command
    return app.WorkController(
        hostname=name,
        concurrency=threads,
        queues=[app.conf.task_default_queue],
        consumer_cls=_Consumer,
        without_mingle=True,
        without_gossip=True,
        ready_callback=lambda _consumer: on_ready(),
    )


def _refuse_command(_state: object, **_arguments: object) -> dict[str, str]:
    return {"error": "remote control is switched off"}


def stop_consuming() -> None:
    """Make the worker of this process end its loop and then wait for its threads. Safe in a signal handler."""
    celery_state.should_stop = 0


def reconnect(
    connection: Connection,
    between_attempts: Callable[[], None] | None = None,
) -> Connection:
    """Retry until the broker is reachable, without a limit.

    Celery's own pause between two attempts grows to 30 s; this one grows to 2 s.
    """

    def failed(error: Exception, _interval: float) -> None:
        log.warning("waiting for %s: %s", connection.as_uri(), unavailable(error))

    connection.ensure_connection(  # type: ignore[no-untyped-call]
        failed, interval_start=0.2, interval_step=0.2, interval_max=2, callback=between_attempts
    )
    return connection


class _Consumer(Consumer):  # type: ignore[misc]
    def ensure_connected(self, conn: Connection) -> Connection:
        return reconnect(conn, maybe_shutdown)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        # A broker that refuses accepts the next connection at once and refuses again: do not spin.
        log.warning("waiting for %s: %s", self.conninfo.as_uri(), unavailable(exc))
        time.sleep(_REFUSED_RETRY_SECONDS)
