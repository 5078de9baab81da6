"""Routes of responses, compatible with OpenAI's API. A response is a view of a job."""

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi import Response as HTTPResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse

from api.bodies import ResponseBody
from api.dependencies import BroadcasterDep, NoQuery, SettingsDep, StoreDep
from api.errors import JOB_STILL_RUNNING, problem
from api.openapi.errors import (
    CONFLICT,
    INVALID,
    INVALID_JOB,
    NOT_FOUND,
    STILL_RUNNING,
    TAKEN,
    TOO_MANY,
    UNAVAILABLE,
    UNREADABLE,
    Responses,
)
from api.openapi.examples import RESPONSE_STREAM
from api.openapi.parameters import IDEMPOTENCY_KEY, described
from api.schemas.paging import Page, PageOptions
from api.streaming.broadcaster import EventBroadcaster
from api.streaming.long_polling import until_ended
from api.streaming.sse import EventStream
from api.submission import Submitter, SubmitterDep
from tpo.core.errors import InvalidInputError, JobNotFoundError, StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.jobs.tables import EventRow
from tpo.jobs.view import JobView
from tpo.openai import items, views
from tpo.openai.requests import JobRequest
from tpo.openai.stream import ResponseEvents
from tpo.store import Store

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], responses={**INVALID, **UNAVAILABLE})


_STREAMED: Responses = {
    200: {
        "description": "The response; with `stream`, its events as Server-Sent Events",
        "content": {"text/event-stream": {"example": RESPONSE_STREAM}},
    }
}


class ResponseQuery(BaseModel):
    """Query parameters of a response."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: bool = Field(False, description="true: stream its events")
    starting_after: int | None = Field(None, ge=-1, le=2**53, description="with stream: only events after this number")


class ItemQuery(PageOptions):
    """Order and page of a list of messages."""

    order: Literal["asc", "desc"] = Field("desc", description="desc: last message first")


class ItemPage(Page[items.InputMessageItem]):
    """A page of messages. Request the next page with `after` set to `last_id`."""


def _job_id(response_id: str) -> str:
    return views.job_id_of(response_id)


ResponseJobId = Annotated[str, Depends(_job_id)]


@router.post(
    "",
    dependencies=[NoQuery],
    response_model=views.Response,
    responses={
        **_STREAMED,
        **INVALID_JOB,
        **UNREADABLE,
        **STILL_RUNNING,
        **TAKEN,
        **TOO_MANY,
    },
    openapi_extra=described(IDEMPOTENCY_KEY),
)
async def create_response(
    request: Request,
    body: ResponseBody,
    submitter: SubmitterDep,
    store: StoreDep,
    broadcaster: BroadcasterDep,
    settings: SettingsDep,
) -> views.Response | HTTPResponse:
    """Create a response. With `background`, it is returned at once, otherwise when its job has ended."""
    job = await run_in_threadpool(submit, body, submitter)
    if body.stream:
        return ResponseStream(broadcaster, store, job, None)
    if not body.background:
        job = await until_ended(broadcaster, store, job, settings.wait_seconds)
        if job.status not in TERMINAL:
            return still_running(request, job, settings.wait_seconds)
    return views.response(job)


@router.get("/{response_id}", response_model=views.Response, responses={**_STREAMED, **NOT_FOUND})
def get_response(
    job_id: ResponseJobId, store: StoreDep, broadcaster: BroadcasterDep, query: Annotated[ResponseQuery, Query()]
) -> views.Response | HTTPResponse:
    """Get a response, or with `stream` its events, from the first event or after `starting_after`."""
    job = store.jobs.get(job_id)
    if query.stream:
        return ResponseStream(broadcaster, store, job, query.starting_after)
    if query.starting_after is not None:
        raise InvalidInputError("starting_after: requires stream=true.", "starting_after")
    return views.response(job)


@router.get("/{response_id}/input_items", responses=NOT_FOUND)
def list_input_items(job_id: ResponseJobId, store: StoreDep, query: Annotated[ItemQuery, Query()]) -> ItemPage:
    """List the input messages of a response, without its instructions."""
    messages = items.input_items(store.jobs.get(job_id))
    ordered = messages if query.order == "asc" else messages[::-1]
    ids = [item.id for item in ordered]
    if query.after is not None and query.after not in ids:
        raise InvalidInputError("after: must be the id of a message of this response.", "after")
    first = 0 if query.after is None else ids.index(query.after) + 1
    return ItemPage.of(ordered[first : first + query.limit + 1], query.limit, lambda item: item)


@router.post("/{response_id}/cancel", dependencies=[NoQuery], responses=NOT_FOUND)
def cancel_response(job_id: ResponseJobId, store: StoreDep) -> views.Response:
    """Cancel a response. Returns the response, even if it had already ended."""
    return views.response(store.jobs.cancel(job_id))


@router.delete("/{response_id}", dependencies=[NoQuery], responses={**NOT_FOUND, **CONFLICT})
def delete_response(response_id: str, job_id: ResponseJobId, store: StoreDep) -> views.ResponseDeleted:
    """Delete an ended response and all its texts."""
    store.jobs.delete(job_id)
    return views.ResponseDeleted(id=response_id)


def submit(body: JobRequest, submitter: Submitter) -> JobView:
    """Submit the job of a request in OpenAI's format. Raises InvalidInputError with that request's field names."""
    wanted = body.submission()
    try:
        return submitter.submit(wanted)
    except InvalidInputError as error:
        raise body.with_request_names(error) from None


def still_running(request: Request, job: JobView, seconds: float) -> JSONResponse:
    """Return 504 for a job that outlasts the wait. The client must not retry: that would create another job."""
    return problem(
        request.scope,
        504,
        detail=JOB_STILL_RUNNING.format(job_id=job.id, response_id=views.response_id(job.id), seconds=seconds),
        code="still_running",
        headers={"location": f"/v1/jobs/{job.id}", "x-should-retry": "false"},
    )


class ResponseStream(EventStream):
    """Streams the numbered events of a response, from the first one or after a given number."""

    def __init__(self, broadcaster: EventBroadcaster, store: Store, job: JobView, after: int | None) -> None:
        super().__init__(broadcaster, store, job, 0)
        self._events = ResponseEvents()
        self._shown = job
        self._from = -1 if after is None else after

    async def frame(self, row: EventRow) -> bytes:
        """Return the response's events for one event of its job."""
        if row.type.removeprefix("job.") in TERMINAL:
            try:
                self._shown = await run_in_threadpool(self._store.jobs.get, row.job_id)
            except (JobNotFoundError, StoreUnavailableError):
                return self.closing("the response cannot be read")
        frames = [
            f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
            for event in self._events.of(self._shown, [row])
            if event["sequence_number"] > self._from
        ]
        return "".join(frames).encode()

    def closing(self, reason: str) -> bytes:
        """Return a comment: OpenAI's events have no type for it. Clients resume after the last number received."""
        return f": closed: {reason}\n\n".encode()
