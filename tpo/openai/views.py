"""Jobs in the shapes of OpenAI's API: a response or a chat completion is a view of a job, without its own row.

Fields that OpenAI's API does not have are under `tpo`.
"""

import re
from typing import Any, Literal

from pydantic import Field

from tpo.core.errors import JobNotFoundError
from tpo.core.status import TERMINAL, Status
from tpo.jobs.view import JobView
from tpo.wire import Wire

ResponseStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
_STATUS: dict[Status, ResponseStatus] = {
    "queued": "queued",
    "paused": "queued",
    "in_progress": "in_progress",
    "cancelling": "in_progress",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "incomplete",
    "incomplete": "incomplete",
}
OPENAI_ERROR_CODES = {"context_too_long": "invalid_prompt", "prompt_refused": "invalid_prompt"}
"""OpenAI's codes for errors that the caller can fix, by the code of this API."""


class CachedTokens(Wire):
    """Tokens read from a cache: always 0."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class ReasoningTokens(Wire):
    """Tokens of reasoning: always 0, because they are not counted separately."""

    reasoning_tokens: int = 0


class ResponseUsage(Wire):
    """Tokens that the policy read and wrote, over all calls of the job."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class OutputText(Wire):
    """The text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


class OutputMessage(Wire):
    """The message that contains the answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponseFailure(Wire):
    """The error of a failed response, with a code of OpenAI's API."""

    code: str
    message: str


class IncompleteDetails(Wire):
    """The reason why a response stopped early."""

    reason: str


class JobDetails(Wire):
    """Details of the job behind a response or a chat completion."""

    job_id: str
    status: Status
    error_code: str | None
    stop_reason: str | None
    iteration: int
    phase: str | None
    best_reward: float | None
    reward_model: str
    reward_tokens: int
    parameters: dict[str, Any]
    event: dict[str, Any] | None = Field(None, description="the job's event; only in a stream")


class Response(Wire):
    """A job as a response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: bool = True
    model: str
    instructions: str | None
    output: list[OutputMessage]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    max_output_tokens: int
    parallel_tool_calls: bool = False
    tool_choice: Literal["none"] = "none"
    tools: tuple[()] = ()
    truncation: Literal["disabled"] = "disabled"
    store: Literal[True] = True
    tpo: JobDetails


class ResponseDeleted(Wire):
    """A deleted response."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class AssistantMessage(Wire):
    """The message of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Wire):
    """The only choice of a chat completion."""

    index: Literal[0] = 0
    message: AssistantMessage
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class ChatUsage(Wire):
    """Tokens that the policy read and wrote, over all calls of the job."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(Wire):
    """A job as a chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    tpo: JobDetails


WITHOUT_OUTPUT = "The job {job_id} ended as {status} without an answer."


def failure(job: JobView) -> tuple[str, str]:
    """Return code and message of a job that ended without an answer."""
    if job.error_code is not None:
        return job.error_code, f"The job {job.id} failed: {job.error_message}"
    return f"job_{job.status}", WITHOUT_OUTPUT.format(job_id=job.id, status=job.status)


def response_id(job_id: str) -> str:
    """Return the id of a job's response."""
    return job_id.replace("job_", "resp_", 1)


def job_id_of(response: str) -> str:
    """Return the id of a response's job. Raises JobNotFoundError if it cannot be the id of a response."""
    if not re.fullmatch("resp_[0-9a-f]{32}", response):
        raise JobNotFoundError("There is no response with this id.")
    return response.replace("resp_", "job_", 1)


def response(job: JobView) -> Response:
    """Build the response of a job."""
    first = job.input[0]
    return Response(
        id=response_id(job.id),
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if job.completed_at and job.status == "completed" else None,
        status=_STATUS[job.status],
        model=job.model,
        instructions=first.content if first.role == "system" else None,
        output=[] if job.output is None else [message(job)],
        error=_failure(job),
        incomplete_details=_incomplete(job),
        usage=_usage(job) if job.status in TERMINAL else None,
        metadata=job.metadata,
        temperature=job.params.temperature,
        top_p=job.params.top_p,
        max_output_tokens=job.params.max_tokens,
        tpo=_details(job),
    )


def message(job: JobView) -> OutputMessage:
    """Build the output message of a job that has an answer."""
    return OutputMessage(
        id=job.id.replace("job_", "msg_", 1),
        status="completed" if job.status == "completed" else "incomplete",
        content=[OutputText(text=job.output or "")],
    )


def chat_completion(job: JobView) -> ChatCompletion:
    """Build the chat completion of a job that has an answer."""
    return ChatCompletion(
        id=job.id.replace("job_", "chatcmpl-", 1),
        created=int(job.created_at),
        model=job.model,
        choices=[Choice(message=AssistantMessage(content=job.output or ""))],
        usage=ChatUsage(
            prompt_tokens=job.input_tokens,
            completion_tokens=job.output_tokens,
            total_tokens=job.input_tokens + job.output_tokens,
        ),
        tpo=_details(job),
    )


def _failure(job: JobView) -> ResponseFailure | None:
    if job.error_code is None:
        return None
    return ResponseFailure(code=OPENAI_ERROR_CODES.get(job.error_code, "server_error"), message=job.error_message or "")


def _incomplete(job: JobView) -> IncompleteDetails | None:
    match job.status:
        case "expired" | "cancelled":
            return IncompleteDetails(reason=job.status)
        case "incomplete":
            return IncompleteDetails(reason=job.incomplete_reason or "deadline")
        case _:
            return None


def _usage(job: JobView) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=job.input_tokens,
        output_tokens=job.output_tokens,
        total_tokens=job.input_tokens + job.output_tokens,
    )


def _details(job: JobView) -> JobDetails:
    return JobDetails(
        job_id=job.id,
        status=job.status,
        error_code=job.error_code,
        stop_reason=job.stop_reason,
        iteration=job.iteration,
        phase=job.phase,
        best_reward=job.best_reward,
        reward_model=job.reward_model,
        reward_tokens=job.reward_tokens,
        parameters=job.params.model_dump(mode="json"),
    )
