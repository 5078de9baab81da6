"""Route of chat completions, compatible with OpenAI's API. The response waits for the end of the job."""

import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from fastapi import Response as HTTPResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from api.bodies import ChatBody
from api.dependencies import BroadcasterDep, NoQuery, SettingsDep, StoreDep
from api.errors import problem
from api.openapi.errors import INVALID, INVALID_JOB, NO_ANSWER, STILL_RUNNING, TAKEN, TOO_MANY, UNAVAILABLE, UNREADABLE
from api.openapi.examples import CHAT_STREAM
from api.openapi.parameters import IDEMPOTENCY_KEY, described
from api.routes.responses import still_running, submit
from api.streaming.long_polling import until_ended
from api.submission import SubmitterDep
from tpo.core.status import TERMINAL
from tpo.jobs.view import JobView
from tpo.openai import views

router = APIRouter(prefix="/v1/chat", tags=["OpenAI"], responses={**INVALID, **UNAVAILABLE})


_STREAMED: dict[str, Any] = {
    "description": "The chat completion; with `stream`, as Server-Sent Events",
    "content": {"text/event-stream": {"example": CHAT_STREAM}},
}


@router.post(
    "/completions",
    dependencies=[NoQuery],
    response_model=views.ChatCompletion,
    responses={200: _STREAMED, **INVALID_JOB, **UNREADABLE, **NO_ANSWER, **STILL_RUNNING, **TAKEN, **TOO_MANY},
    openapi_extra=described(IDEMPOTENCY_KEY),
)
async def create_chat_completion(
    request: Request,
    body: ChatBody,
    submitter: SubmitterDep,
    store: StoreDep,
    broadcaster: BroadcasterDep,
    settings: SettingsDep,
) -> views.ChatCompletion | HTTPResponse:
    """Create a chat completion and wait for its job to end. With `stream`, the text is sent as one chunk."""
    job = await run_in_threadpool(submit, body, submitter)
    job = await until_ended(broadcaster, store, job, settings.wait_seconds)
    if job.status not in TERMINAL:
        return still_running(request, job, settings.wait_seconds)
    if job.output is None:
        return _without_answer(request, job)
    completion = views.chat_completion(job)
    if not body.stream:
        return completion
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return StreamingResponse(_chunks(completion, usage), media_type="text/event-stream")


def _without_answer(request: Request, job: JobView) -> HTTPResponse:
    """Return the error of a job that ended without output. Its client must not retry: that would create another job."""
    code, detail = views.failure(job)
    return problem(
        request.scope,
        422 if job.error_code in views.OPENAI_ERROR_CODES else 500,
        detail=detail,
        code=code,
        headers={"location": f"/v1/jobs/{job.id}", "x-should-retry": "false"},
    )


def _chunks(completion: views.ChatCompletion, with_usage: bool) -> Iterator[str]:
    """Iterate over the chunks of a streamed chat completion."""
    head = {
        "id": completion.id,
        "object": "chat.completion.chunk",
        "created": completion.created,
        "model": completion.model,
    }
    choice = completion.choices[0]
    delta = {"role": "assistant", "content": choice.message.content}
    yield _frame({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _frame({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice.finish_reason}]})
    if with_usage:
        yield _frame({**head, "choices": [], "usage": completion.usage.model_dump()})
    yield "data: [DONE]\n\n"


def _frame(chunk: dict[str, object]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
