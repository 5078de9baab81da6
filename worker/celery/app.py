"""The Celery app and its settings: a broker that is only a notifier, and threads."""

import time
from collections.abc import Callable

from celery import Celery
from celery.worker import WorkController
from celery.worker import state as celery_state
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.connection import Connection

from tpo.broker import BROKER_TRANSPORT_OPTIONS, unavailable
from tpo.settings import Settings
from worker.logs import log

_REFUSED_SECONDS = 1.0


def make_app(settings: Settings, queue: str, **more: object) -> Celery:
    """A Celery app whose workers listen to one queue."""
    app = Celery("tpo", broker=settings.broker_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        # Acknowledged early: the lease in the database brings a lost job back. With late acknowledgement celery 5.7.0
        # stops consuming when the broker goes away under a busy worker.
        task_acks_late=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=queue,
        task_send_sent_event=True,
        worker_send_task_events=True,
        worker_pool="threads",
        # A notifier must not lie reserved in a busy worker while another one is idle.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_prefetch_count_reduction=False,
        # Cancels late-acknowledged tasks alone, of which there are none; unset, each reconnection warns.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A broker that answers and refuses, for its memory is full, is waited for as one that is away.
        broker_channel_error_retry=True,
        broker_transport_options=BROKER_TRANSPORT_OPTIONS,
        **more,
    )
    return app


def controller(app: Celery, *, name: str, threads: int, on_ready: Callable[[], None]) -> WorkController:
    """A worker that starts to consume with `start()`; `on_ready` is called once, when it does."""
    return app.WorkController(
        hostname=name,
        concurrency=threads,
        queues=[app.conf.task_default_queue],
        consumer_cls=_Consumer,
        without_mingle=True,
        without_gossip=True,
        ready_callback=lambda _consumer: on_ready(),
    )


def stop_consuming() -> None:
    """Make the worker of this process end its loop, then wait for its threads. Safe in a signal handler."""
    celery_state.should_stop = 0


def reconnect(
    connection: Connection,
    between_tries: Callable[[], None] | None = None,
) -> Connection:
    """Try to reach the broker for ever. Celery's own pause between two tries grows to 30 s; ours, to 2 s."""

    def failed(error: Exception, _interval: float) -> None:
        log.warning("waiting for %s: %s", connection.as_uri(), unavailable(error))

    connection.ensure_connection(  # type: ignore[no-untyped-call]
        failed, interval_start=0.2, interval_step=0.2, interval_max=2, callback=between_tries
    )
    return connection


class _Consumer(Consumer):  # type: ignore[misc]
    def ensure_connected(self, conn: Connection) -> Connection:
        return reconnect(conn, maybe_shutdown)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        # A broker that refuses is connected to at once, and refuses again.
        log.warning("waiting for %s: %s", self.conninfo.as_uri(), unavailable(exc))
        time.sleep(_REFUSED_SECONDS)
