"""The only producer of Celery messages, and the names that API and workers share.

A message contains only the id of a job or a batch. It may be lost or delivered twice: the database is the
source of truth, and the rescuer notifies again. A job's message only says that a job waits; the worker asks the
database for the next one. So a few messages serve any number of waiting jobs, and the broker's queue stays short.
"""

import hashlib
import re
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

from tpo.core.errors import BrokerUnavailableError, causes

RUN_JOB = "tpo.run_job"
ADVANCE_BATCH = "tpo.advance_batch"
MAINTENANCE_QUEUE = "tpo.maintenance"

BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {
    "socket_timeout": 2,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 10,
}
"""Without these, a broker that hangs blocks a producer for over 40 s (measured with celery 5.7.0)."""

MAX_QUEUED_WAKEUPS = 32
"""Enough queued wake-ups: each worker that claims a job sends the next one."""

_REASONS: dict[type[Exception], str] = {
    AuthenticationError: "The broker refuses the user or password of TPO_BROKER_URL.",
    NoPermissionError: "The broker's user may not do that: give it all commands and keys.",
    OutOfMemoryError: "The broker's memory is full: raise its maxmemory.",
    ReadOnlyError: "The broker is a replica: TPO_BROKER_URL must name the one that is written to.",
}


def unavailable(error: BaseException) -> BrokerUnavailableError:
    """Return an error that explains the broker's error without its message, which may quote a command."""
    for cause in causes(error):
        for kind, why in _REASONS.items():
            if isinstance(cause, kind):
                return BrokerUnavailableError(why)
        if isinstance(cause, ResponseError) and "DB index" in str(cause):
            return BrokerUnavailableError("The broker has no database of the number in TPO_BROKER_URL.")
    return BrokerUnavailableError()


def is_broker_error(error: BaseException) -> bool:
    """Return whether the broker, or one of the libraries that speak to it, raised the error."""
    return isinstance(error, RedisError | KombuError)


def queue_name(model: str) -> str:
    """Return the name of a policy's queue. Invalid characters become `_`, and a hash then keeps the name unique."""
    valid = re.sub(r"[^A-Za-z0-9.-]+", "_", model)
    suffix = "" if valid == model else "-" + hashlib.blake2b(model.encode(), digest_size=4).hexdigest()
    return f"tpo.jobs.{valid}{suffix}"


class JobNotifier:
    """Notifies workers through the broker. Safe to share among threads."""

    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("tpo-notifier", broker=broker_url, set_as_current=False)
        self._celery.conf.update(
            # One immediate retry covers a restarted broker; if it cannot be reached, the rescuer notifies later.
            broker_transport_options={**BROKER_TRANSPORT_OPTIONS, "max_retries": 1, "interval_start": 0},
            broker_connection_timeout=2,
            task_ignore_result=True,
            task_serializer="json",
        )
        self._redis = Redis.from_url(
            broker_url,
            socket_timeout=2,
            socket_connect_timeout=2,
            socket_keepalive=True,
            # One retry covers a broker that was restarted; one that hangs would only hang again.
            retry=Retry(NoBackoff(), retries=1, supported_errors=(RedisConnectionError,)),
        )

    def notify_job(self, job_id: str, model: str) -> None:
        """Notify the workers of a policy that a job waits. Raises BrokerUnavailableError within some 2 s.

        If enough wake-ups are queued, none is sent: a worker that takes one of them sends the next.
        """
        queue = queue_name(model)
        if not self._has_enough_wakeups(queue):
            self._send(RUN_JOB, job_id, queue)

    def notify_batch(self, batch_id: str) -> None:
        """Notify the maintenance worker that a batch can advance. Raises BrokerUnavailableError within some 2 s."""
        self._send(ADVANCE_BATCH, batch_id, MAINTENANCE_QUEUE)

    def _send(self, task: str, row_id: str, queue: str) -> None:
        try:
            self._celery.send_task(task, args=[row_id], queue=queue, retry=False)
        except (OperationalError, OSError) as error:
            raise unavailable(error) from error

    def pending_count(self, model: str) -> int:
        """Return how many wake-ups the workers of a policy have not taken. Raises BrokerUnavailableError."""
        return self._queue_length(queue_name(model))

    def pending_maintenance_count(self) -> int:
        """Return how many messages the maintenance worker has not taken. Raises BrokerUnavailableError."""
        return self._queue_length(MAINTENANCE_QUEUE)

    def _queue_length(self, queue: str) -> int:
        try:
            return int(self._redis.llen(queue))
        except RedisError as error:
            raise unavailable(error) from error

    def _has_enough_wakeups(self, queue: str) -> bool:
        try:
            return int(self._redis.llen(queue)) >= MAX_QUEUED_WAKEUPS
        except RedisTimeout as error:
            raise unavailable(error) from error
        except RedisError:
            return False  # sending shows whether the broker can be reached, and reconnects if it was restarted

    def ping(self) -> None:
        """Check that the broker answers. Raises BrokerUnavailableError within some 2 s."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except (OperationalError, OSError) as error:
            raise unavailable(error) from error

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()
        self._celery.close()
