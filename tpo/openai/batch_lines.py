"""The lines of a batch: requests as they stand in its input, and results as its files hold them."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, StringConstraints, ValidationError
from pydantic_core import from_json

from tpo import validation_messages
from tpo.batches.tables import BatchLine
from tpo.core.errors import InvalidInputError
from tpo.jobs.tables import Job
from tpo.openai import views
from tpo.openai.requests import ChatRequest, JobRequest, ResponseRequest
from tpo.wire import StoredText, Wire

Endpoint = Literal["/v1/responses", "/v1/chat/completions"]
_REQUESTS: dict[str, type[JobRequest]] = {"/v1/responses": ResponseRequest, "/v1/chat/completions": ChatRequest}
_MARK = b"\xef\xbb\xbf"
LONGEST_CUSTOM_ID = 512


class RawLine(NamedTuple):
    """One line of a file."""

    text: bytes | None
    """Without its end; None where it is too long to be kept."""
    size: int
    """Bytes, its end included."""


class _Line(Wire):
    custom_id: Annotated[StoredText, StringConstraints(min_length=1, max_length=LONGEST_CUSTOM_ID)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any] = Field(strict=True)


class Request(NamedTuple):
    """A line that asks for a job."""

    custom_id: str
    body: JobRequest


class Refused(NamedTuple):
    """A line that cannot be a job, and why."""

    custom_id: str | None
    error: InvalidInputError


def split(parts: Iterable[bytes], longest: int) -> Iterator[RawLine]:
    """The lines of what comes in parts, holding no more than a part and one line of allowed length."""
    kept, size, too_long = bytearray(), 0, False
    for part in parts:
        at = 0
        while at < len(part):
            end = part.find(b"\n", at)
            stop = len(part) if end < 0 else end
            size += stop - at
            too_long = too_long or len(kept) + stop - at > longest
            if too_long:
                kept.clear()
            else:
                kept += part[at:stop]
            at = stop
            if end >= 0:
                yield RawLine(None if too_long else bytes(kept), size + 1)
                kept, size, too_long, at = bytearray(), 0, False, stop + 1
    if size:
        yield RawLine(None if too_long else bytes(kept), size)


def is_blank(line: RawLine) -> bool:
    """Whether there is nothing on a line: it is no request."""
    return line.text is not None and not line.text.removeprefix(_MARK).strip()


def read(line: RawLine, endpoint: str) -> Request | Refused:
    """What a line asks for."""
    if line.text is None:
        return Refused(None, InvalidInputError("The line is too long."))
    try:
        found = from_json(line.text.removeprefix(_MARK), allow_inf_nan=False)
    except ValueError:
        return Refused(None, InvalidInputError("The line is not JSON in UTF-8, or it is nested too deeply."))
    if not isinstance(found, dict):
        return Refused(None, InvalidInputError("The line must be a JSON object."))
    custom_id = _custom_id(found)
    try:
        parsed = _Line.model_validate(found)
        if parsed.url != endpoint:
            raise InvalidInputError(f"url: must be the batch's endpoint, {endpoint}.", "url")
        body = _REQUESTS[endpoint].model_validate(parsed.body)
    except ValidationError as error:
        return Refused(custom_id, validation_messages.invalid(error))
    except InvalidInputError as error:
        return Refused(custom_id, error)
    if body.stream:
        return Refused(custom_id, InvalidInputError("stream: is not for batches.", "stream"))
    if "external_id" in (body.tpo or {}):
        said = "tpo.external_id: is not for batches; custom_id names a line."
        return Refused(custom_id, InvalidInputError(said, "tpo.external_id"))
    return Request(parsed.custom_id, body)


def is_answered(job: Job | None) -> bool:
    """Whether a job's line stands in the output, not among the errors."""
    return job is not None and job.output is not None


def result(endpoint: str, line: BatchLine, job: Job | None) -> bytes:
    """A line of the output or of the errors, with its end."""
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    if job is not None and job.output is not None:
        body = views.response(job) if endpoint == "/v1/responses" else views.chat_completion(job)
        response = {"status_code": 200, "request_id": job.id, "body": body.model_dump()}
    else:
        code, message = _why(line, job)
        error = {"code": code, "message": message, "param": line.error_param, "line": line.number}
    told = {
        "id": f"batch_req_{line.batch_id.removeprefix('batch_')}_{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def _why(line: BatchLine, job: Job | None) -> tuple[str, str]:
    if line.error_code is not None:
        return line.error_code, line.error_message or ""
    if job is None:
        return "job_deleted", "The job of this line was deleted before the batch ended."
    if job.error_code is not None:
        return job.error_code, f"The job {job.id} failed: {job.error_message}"
    return f"job_{job.status}", f"The job {job.id} ended as {job.status} without an answer."


def _custom_id(found: dict[str, Any]) -> str | None:
    """By which name a refused line is told, where it has one that can be stored."""
    given = found.get("custom_id")
    usable = isinstance(given, str) and 0 < len(given) <= LONGEST_CUSTOM_ID and "\x00" not in given
    return given if usable else None
