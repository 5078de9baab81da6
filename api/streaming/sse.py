"""Stream a job's events as Server-Sent Events."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Response as HTTPResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api import views
from api.errors import problem
from api.streaming.broadcaster import EventBroadcaster, Subscription
from tpo.core.errors import StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.jobs.tables import EventRow
from tpo.jobs.view import JobView
from tpo.store import Store

logger = logging.getLogger("api")

COMMENT_SECONDS = 15.0
SEND_SECONDS = 60.0
"""A client that has read nothing for so many seconds is disconnected."""

_PAGE = 200
_LAST = frozenset(f"job.{status}" for status in TERMINAL)
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(HTTPResponse):
    """The events of one job as Server-Sent Events, until its last one, its subscription's end, or the server's.

    Another resource that is a view of a job overrides how an event, and an early end, are written.
    """

    def __init__(self, broadcaster: EventBroadcaster, store: Store, job: JobView, after: int) -> None:
        super().__init__(status_code=200)
        self._broadcaster = broadcaster
        self._store = store
        # Not the row itself: a thousand of these wait at once, and a row holds texts.
        self._job_id, self._last_event, self._ended = job.id, job.last_event, job.status in TERMINAL
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave sending to the outermost layer: the frames around a route hold more memory than a subscription does."""
        if self._broadcaster.full:
            detail = "The server has as many streams as it may have. Poll the job instead, or try again later."
            await problem(scope, 503, detail=detail, code="too_many_streams")(scope, receive, send)
            return
        scope["state"]["streams_after_route"] = self.send_events

    async def send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until the stream ends or the client disconnects."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with self._broadcaster.subscribe(self._job_id, self._last_event) as subscription:
            gone = asyncio.create_task(_until_gone(receive))
            gone.add_done_callback(lambda _: subscription.drop("gone"))
            try:
                async for frame in self._frames(subscription):
                    async with asyncio.timeout(SEND_SECONDS):
                        await send({"type": "http.response.body", "body": frame, "more_body": True})
            except TimeoutError:
                logger.warning("request %s: the client reads nothing and is disconnected", scope["state"]["request_id"])
                return
            finally:
                gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, subscription: Subscription) -> AsyncIterator[bytes]:
        after, live_from = self._after, subscription.seen
        while after < live_from:
            if subscription.end is not None:  # what stands in its buffer follows numbers that were not sent
                yield self.closing(subscription.end)
                return
            try:
                rows = await run_in_threadpool(self._store.jobs.events, self._job_id, after=after, limit=_PAGE)
            except StoreUnavailableError:
                yield self.closing("database_unavailable")
                return
            for row in rows:
                yield await self.frame(row)
                if row.type in _LAST:
                    return
            if not rows:
                yield self.closing("job_deleted")
                return
            after = rows[-1].number
        if self._ended:
            return
        while True:
            try:
                event = await subscription.next(COMMENT_SECONDS)
            except TimeoutError:
                yield b": still here\n\n"
                continue
            if event is None:
                yield self.closing(subscription.end or "server_stopping")
                return
            if event.number > after or event.type in _LAST:
                yield await self.frame(event)
            if event.type in _LAST:
                return

    async def frame(self, row: EventRow) -> bytes:
        """One event as it is sent."""
        data = json.dumps(views.event(row).model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)
        return f"id: {row.number}\nevent: {row.type}\ndata: {data}\n\n".encode()

    def closing(self, reason: str) -> bytes:
        """Why the stream ends before its job. It has no id: the last number that was seen is the one to resume from."""
        data: dict[str, Any] = {"type": "stream.closed", "reason": reason}
        return f"event: stream.closed\ndata: {json.dumps(data)}\n\n".encode()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
