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
from api.errors import TOO_MANY_STREAMS, problem
from api.streaming.broadcaster import EventBroadcaster, Subscription
from tpo.core.errors import StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.jobs.tables import EventRow
from tpo.jobs.view import JobView
from tpo.store import Store

logger = logging.getLogger("api")

COMMENT_SECONDS = 15.0
SEND_SECONDS = 60.0
"""A client that accepts no data for this long is disconnected."""

_PAGE = 200
_LAST = frozenset(f"job.{status}" for status in TERMINAL)
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(HTTPResponse):
    """Streams the events of one job until its last event, the end of its subscription, or the stop of the server.

    Subclasses for other views of a job override `frame` and `closing`.
    """

    def __init__(self, broadcaster: EventBroadcaster, store: Store, job: JobView, after: int) -> None:
        super().__init__(status_code=200)
        self._broadcaster = broadcaster
        self._store = store
        # Not the row itself: thousands of streams wait at once, and a row contains texts.
        self._job_id, self._last_event, self._ended = job.id, job.last_event, job.status in TERMINAL
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the stream to the outermost middleware, so that FastAPI's state of the request can be freed."""
        if self._broadcaster.full:
            refusal = problem(scope, 503, detail=TOO_MANY_STREAMS, code="too_many_streams")
            await refusal(scope, receive, send)
            return
        scope["state"]["streams_after_route"] = self.send_events

    async def send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send frames until the stream ends or the client disconnects."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with self._broadcaster.subscribe(self._job_id, self._last_event) as subscription:
            disconnect = asyncio.create_task(_until_disconnect(receive))
            disconnect.add_done_callback(lambda _: subscription.close("disconnected"))
            try:
                async for frame in self._frames(subscription):
                    async with asyncio.timeout(SEND_SECONDS):
                        await send({"type": "http.response.body", "body": frame, "more_body": True})
            except TimeoutError:
                logger.warning("request %s: the client reads nothing and is disconnected", scope["state"]["request_id"])
                return
            finally:
                disconnect.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, subscription: Subscription) -> AsyncIterator[bytes]:
        after, live_from = self._after, subscription.seen
        while after < live_from:
            if subscription.close_reason is not None:  # its buffer continues after numbers that were not sent
                yield self.closing(subscription.close_reason)
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
                yield self.closing(subscription.close_reason or "server_stopping")
                return
            if event.number > after or event.type in _LAST:
                yield await self.frame(event)
            if event.type in _LAST:
                return

    async def frame(self, row: EventRow) -> bytes:
        """Return one event in the format of Server-Sent Events."""
        data = json.dumps(views.event(row).model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False)
        return f"id: {row.number}\nevent: {row.type}\ndata: {data}\n\n".encode()

    def closing(self, reason: str) -> bytes:
        """Return the frame that ends a stream early. It has no id, so clients resume after the last event received."""
        data: dict[str, Any] = {"type": "stream.closed", "reason": reason}
        return f"event: stream.closed\ndata: {json.dumps(data)}\n\n".encode()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
