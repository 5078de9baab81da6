"""Route of a job's events: a list, or a stream of Server-Sent Events."""

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Response as HTTPResponse
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.dependencies import BroadcasterDep, JobId, StoreDep
from api.openapi.errors import INVALID, NOT_FOUND, UNAVAILABLE
from api.openapi.examples import STREAM
from api.openapi.parameters import LAST_EVENT_ID, described
from api.schemas import queries
from api.schemas.paging import fitting
from api.streaming.sse import EventStream
from tpo.core.errors import InvalidInputError

_NUMBER = re.compile(r"[0-9]{1,15}")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses={**INVALID, **UNAVAILABLE})


@router.get(
    "/{job_id}/events",
    response_model=schemas.EventList,
    responses={
        200: {
            "description": "The events, as a list; with `?stream=true` or `Accept: text/event-stream`, as a stream",
            "content": {"text/event-stream": {"example": STREAM}},
        },
        **NOT_FOUND,
    },
    openapi_extra=described(LAST_EVENT_ID),
)
async def list_events(
    request: Request,
    job_id: JobId,
    store: StoreDep,
    broadcaster: BroadcasterDep,
    query: Annotated[queries.EventQuery, Query()],
) -> schemas.EventList | HTTPResponse:
    """List or stream the events of a job, numbered without gaps. A stream ends after the job's last event.

    Resume an interrupted stream with `starting_after`, or with the header `Last-Event-ID`, which takes precedence.
    """
    job = await run_in_threadpool(store.jobs.get, job_id)
    after = _last_seen(request, query)
    if query.stream if query.stream is not None else _accepts_stream(request):
        return EventStream(broadcaster, store, job, after)
    rows = await run_in_threadpool(store.jobs.events, job_id, after=after, limit=query.limit + 1)
    shown = fitting(map(views.event, rows[: query.limit]))
    return schemas.EventList(data=shown, has_more=len(rows) > len(shown))


def _last_seen(request: Request, query: queries.EventQuery) -> int:
    header = request.headers.get("last-event-id", "")
    if not header:
        return query.starting_after
    if not _NUMBER.fullmatch(header):
        raise InvalidInputError("Last-Event-ID: must be the number of an event.", "Last-Event-ID")
    return int(header)


def _accepts_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")
