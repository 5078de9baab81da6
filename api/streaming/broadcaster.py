"""Broadcast events: one task per process polls the database, however many subscriptions are open.

A subscription has a bounded buffer. It is closed with a reason if its client does not keep up; the client resumes after
the last event that it received. No state outlives a subscription.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

from starlette.concurrency import run_in_threadpool

from api.errors import log_unexpected
from tpo.core.errors import StoreUnavailableError
from tpo.jobs.tables import EventRow
from tpo.store import Store

logger = logging.getLogger("api")

POLL_SECONDS = 0.1
"""Polling interval. An event waits for half of it on average."""

_MAX_PAUSE_SECONDS = 2.0
_LAST_POLL_SECONDS = 1.0
"""Time for a running query to finish at shutdown."""
_BUFFER_EVENTS = 256

CloseReason = Literal["slow_listener", "job_deleted", "server_stopping", "disconnected"]


class Subscription:
    """Buffer of one subscriber to the events of one job."""

    def __init__(self, job_id: str, seen: int) -> None:
        self.job_id = job_id
        self.seen = seen
        """Number of the last event that was buffered. Events up to the initial value must be read from the database."""
        self.close_reason: CloseReason | None = None
        # A process has thousands of these; an asyncio.Queue takes four times the memory.
        self._buffer: list[EventRow] = []
        self._arrival: asyncio.Future[None] | None = None

    async def next(self, timeout: float) -> EventRow | None:
        """Return the next event, or None after the end. Raises TimeoutError after `timeout` seconds without one."""
        if not self._buffer and self.close_reason is None:
            self._arrival = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(timeout):
                await self._arrival
        return self._buffer.pop(0) if self._buffer else None

    def put(self, event: EventRow) -> None:
        """Add an event to the buffer. If the buffer is full, close the subscription."""
        if self.close_reason is None and event.number > self.seen:
            self.seen = event.number
            if len(self._buffer) >= _BUFFER_EVENTS:
                self.close("slow_listener")
            else:
                self._buffer.append(event)
                self._wake()

    def close(self, reason: CloseReason) -> None:
        """Close the subscription; the events in its buffer can still be read."""
        if self.close_reason is None:
            self.close_reason = reason
            self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class EventBroadcaster:
    """Sends new events to all subscriptions of one process. Not thread-safe: use it only in the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.max_streams: int | None = None
        """Maximum number of open subscriptions; None for no limit."""
        self._seen: dict[str, int] = {}
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._subscribed = asyncio.Event()
        self._stopping = False
        self._unavailable = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["EventBroadcaster"]:
        """Poll the database while the context is open."""
        polling = asyncio.create_task(self._poll_forever())
        try:
            yield self
        finally:
            self.stop()
            polling.cancel()
            with suppress(asyncio.CancelledError):
                await polling

    def stop(self) -> None:
        """Close every subscription, so that the server can stop. Clients resume at another process."""
        self._stopping = True
        for subscription in [each for of_job in self._subscriptions.values() for each in of_job]:
            subscription.close("server_stopping")

    @asynccontextmanager
    async def subscribe(self, job_id: str, last_event: int) -> AsyncIterator[Subscription]:
        """Subscribe to the events of a job whose row was read at `last_event`. Buffers the events after `seen`."""
        seen = self._seen.setdefault(job_id, last_event)
        subscription = Subscription(job_id, seen)
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        self._subscribed.set()
        if self._stopping:
            subscription.close("server_stopping")
        try:
            yield subscription
        finally:
            self._subscriptions[job_id].discard(subscription)
            if not self._subscriptions[job_id]:
                del self._subscriptions[job_id], self._seen[job_id]

    @property
    def subscriptions(self) -> int:
        """Return the number of open subscriptions."""
        return sum(len(each) for each in self._subscriptions.values())

    @property
    def full(self) -> bool:
        """Return whether no further subscription may be opened, so that other requests find a connection."""
        return self.max_streams is not None and self.subscriptions >= self.max_streams

    async def _poll_forever(self) -> None:
        pause = POLL_SECONDS
        while True:
            if not self._subscriptions:
                self._subscribed.clear()
                await self._subscribed.wait()
            try:
                await self._poll()
                if self._unavailable:
                    logger.info("event streams continue: the database is available")
                pause, self._unavailable = POLL_SECONDS, False
            except StoreUnavailableError as error:
                if not self._unavailable:
                    logger.warning("event streams wait for the database: %s", error)
                pause, self._unavailable = min(2 * pause, _MAX_PAUSE_SECONDS), True
            except Exception as error:
                log_unexpected(error, "of the event streams")
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _poll(self) -> None:
        query = asyncio.ensure_future(run_in_threadpool(self._store.events.new_events, dict(self._seen)))
        try:
            new = await asyncio.shield(query)
        except asyncio.CancelledError:
            # The thread continues; unless it returns its connection before the pool is closed, the connection leaks.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_POLL_SECONDS):
                    await asyncio.gather(query, return_exceptions=True)
            raise
        for event in new.events:
            # Meanwhile the job's last subscription may have ended, and a new one with a higher number started.
            if event.number > self._seen.get(event.job_id, event.number):
                self._seen[event.job_id] = event.number
                for subscription in self._subscriptions[event.job_id]:
                    subscription.put(event)
        for job_id in new.deleted_jobs:
            for subscription in self._subscriptions.get(job_id, ()):
                subscription.close("job_deleted")
