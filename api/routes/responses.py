"""Responses, as OpenAI's clients know them: a job by another name."""

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
from api.errors import problem
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
    Answers,
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


_STREAMED: Answers = {
    200: {
        "description": "The response; with `stream`, its events as Server-Sent Events",
        "content": {"text/event-stream": {"example": RESPONSE_STREAM}},
    }
}


class ResponseQuery(BaseModel):
    """How a response is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: bool = Field(False, description="true: its events, as they come")
    starting_after: int | None = Field(None, ge=-1, le=2**53, description="with stream: those after this number")


class ItemQuery(PageOptions):
    """Which of a response's messages a list holds."""

    order: Literal["asc", "desc"] = Field("desc", description="desc: the last one first")


class ItemPage(Page[items.AskedMessage]):
    """A page of messages; the next one starts `after` its `last_id`."""


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
    """Create a response: at once with `background`, otherwise when its job has ended."""
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
    """Get a response, or with `stream` its events, from the first or after `starting_after`."""
    job = store.jobs.get(job_id)
    if query.stream:
        return ResponseStream(broadcaster, store, job, query.starting_after)
    if query.starting_after is not None:
        raise InvalidInputError("starting_after: is for streams; send stream=true with it.", "starting_after")
    return views.response(job)


@router.get("/{response_id}/input_items", responses=NOT_FOUND)
def list_input_items(job_id: ResponseJobId, store: StoreDep, query: Annotated[ItemQuery, Query()]) -> ItemPage:
    """List the input messages of a response, without its instructions."""
    said = items.input_items(store.jobs.get(job_id))
    ordered = said if query.order == "asc" else said[::-1]
    ids = [item.id for item in ordered]
    if query.after is not None and query.after not in ids:
        raise InvalidInputError("after: is no message of this response.", "after")
    first = 0 if query.after is None else ids.index(query.after) + 1
    return ItemPage.of(ordered[first : first + query.limit + 1], query.limit, lambda item: item)


@router.post("/{response_id}/cancel", dependencies=[NoQuery], responses=NOT_FOUND)
def cancel_response(job_id: ResponseJobId, store: StoreDep) -> views.Response:
    """Cancel a response. Returns the response, also if it had already ended."""
    return views.response(store.jobs.cancel(job_id))


@router.delete("/{response_id}", dependencies=[NoQuery], responses={**NOT_FOUND, **CONFLICT})
def delete_response(response_id: str, job_id: ResponseJobId, store: StoreDep) -> views.ResponseDeleted:
    """Delete an ended response and all its texts."""
    store.jobs.delete(job_id)
    return views.ResponseDeleted(id=response_id)


def submit(body: JobRequest, submitter: Submitter) -> JobView:
    """The job that a request in OpenAI's shape asks for. Raises InvalidInputError by the names of that request."""
    wanted = body.submission()
    try:
        return submitter.submit(wanted)
    except InvalidInputError as error:
        raise body.with_request_names(error) from None


def still_running(request: Request, job: JobView, seconds: float) -> JSONResponse:
    """The answer to those who wait longer than the server does. A client that repeats it would make a second job."""
    detail = (
        f"The job {job.id} still runs after {seconds:g} s and goes on: poll /v1/responses/{views.response_id(job.id)}, "
        "or ask with background: true."
    )
    return problem(
        request.scope,
        504,
        detail=detail,
        code="still_running",
        headers={"location": f"/v1/jobs/{job.id}", "x-should-retry": "false"},
    )


class ResponseStream(EventStream):
    """The events of a response, each with its number, from the first or after a number that a client has seen."""

    def __init__(self, broadcaster: EventBroadcaster, store: Store, job: JobView, after: int | None) -> None:
        super().__init__(broadcaster, store, job, 0)
        self._told = ResponseEvents()
        self._shown = job
        self._from = -1 if after is None else after

    async def frame(self, row: EventRow) -> bytes:
        """What one event of the job means for the response."""
        if row.type.removeprefix("job.") in TERMINAL:
            try:
                self._shown = await run_in_threadpool(self._store.jobs.get, row.job_id)
            except (JobNotFoundError, StoreUnavailableError):
                return self.closing("the response cannot be read")
        frames = [
            f"event: {told['type']}\ndata: {json.dumps(told, separators=(',', ':'))}\n\n"
            for told in self._told.of(self._shown, [row])
            if told["sequence_number"] > self._from
        ]
        return "".join(frames).encode()

    def closing(self, reason: str) -> bytes:
        """A comment: clients have no type for it, and resume after the last number that they have seen."""
        return f": closed: {reason}\n\n".encode()
