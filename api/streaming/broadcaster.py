"""Broadcast events: one task per process polls the database, however many subscriptions are open.

A subscription has a bounded buffer. A client that does not keep up is dropped with a reason; it resumes after the
last event number that it has seen. No state outlives a subscription.
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

LOOK_SECONDS = 0.1
"""How often the reader looks: half of it is what an event waits on the average."""

_LONGEST_PAUSE = 2.0
_LAST_LOOK_SECONDS = 1.0
"""What a look that runs at the end gets to end in."""
_BUFFER = 256

EndReason = Literal["slow_listener", "job_deleted", "server_stopping", "gone"]


class Subscription:
    """Who waits for the events of one job, from a number on."""

    def __init__(self, job_id: str, seen: int) -> None:
        self.job_id = job_id
        self.seen = seen
        """What stands in the database up to this number is not told again here."""
        self.end: EndReason | None = None
        # A thousand of these wait at once: asyncio's own queue takes four times the memory.
        self._buffer: list[EventRow] = []
        self._news: asyncio.Future[None] | None = None

    async def next(self, timeout: float) -> EventRow | None:
        """The next event, or None at the subscription's end. Raises TimeoutError when nothing happened for so long."""
        if not self._buffer and self.end is None:
            self._news = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(timeout):
                await self._news
        return self._buffer.pop(0) if self._buffer else None

    def put(self, event: EventRow) -> None:
        """Put an event into the buffer; a subscription whose buffer is full is at its end."""
        if self.end is None and event.number > self.seen:
            self.seen = event.number
            if len(self._buffer) >= _BUFFER:
                self.drop("slow_listener")
            else:
                self._buffer.append(event)
                self._wake()

    def drop(self, reason: EndReason) -> None:
        """Let the subscription end once it has read what is in its buffer."""
        if self.end is None:
            self.end = reason
            self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class EventBroadcaster:
    """Tells the listeners of one process what happens. For its event loop alone."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.max_streams: int | None = None
        """How many subscriptions may be open; None for no limit."""
        self._seen: dict[str, int] = {}
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._anybody = asyncio.Event()
        self._stopping = False
        self._away = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["EventBroadcaster"]:
        """Read while the block runs."""
        reader = asyncio.create_task(self._read())
        try:
            yield self
        finally:
            self.stop()
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    def stop(self) -> None:
        """End every subscription, so that the server can end; they resume elsewhere."""
        self._stopping = True
        for subscription in [each for listeners in self._subscriptions.values() for each in listeners]:
            subscription.drop("server_stopping")

    @asynccontextmanager
    async def subscribe(self, job_id: str, last_event: int) -> AsyncIterator[Subscription]:
        """Subscribe to a job's events after `last_event`; the subscription starts at `subscription.seen`."""
        seen = self._seen.setdefault(job_id, last_event)
        subscription = Subscription(job_id, seen)
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        self._anybody.set()
        if self._stopping:
            subscription.drop("server_stopping")
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

    async def _read(self) -> None:
        pause = LOOK_SECONDS
        while True:
            if not self._subscriptions:
                self._anybody.clear()
                await self._anybody.wait()
            try:
                await self._look()
                if self._away:
                    logger.info("the event streams go on: the database is back")
                pause, self._away = LOOK_SECONDS, False
            except StoreUnavailableError as error:
                if not self._away:
                    logger.warning("the event streams wait: %s", error)
                pause, self._away = min(2 * pause, _LONGEST_PAUSE), True
            except Exception as error:
                log_unexpected(error, "of the event streams")
                pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _look(self) -> None:
        looking = asyncio.ensure_future(run_in_threadpool(self._store.events.new_events, dict(self._seen)))
        try:
            news = await asyncio.shield(looking)
        except asyncio.CancelledError:
            # Its thread goes on, and would give its connection back to a pool that is closed by then, and kept open.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_LOOK_SECONDS):
                    await asyncio.gather(looking, return_exceptions=True)
            raise
        for event in news.events:
            # Between two looks a job may have lost its last subscription and found a new one, who has seen more.
            if event.number > self._seen.get(event.job_id, event.number):
                self._seen[event.job_id] = event.number
                for subscription in self._subscriptions[event.job_id]:
                    subscription.put(event)
        for job_id in news.deleted_jobs:
            for subscription in self._subscriptions.get(job_id, ()):
                subscription.drop("job_deleted")
