"""Lines of a batch as OpenAI writes them: requests in its input, results in its output and error files."""

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, StringConstraints, ValidationError
from pydantic_core import from_json

from tpo import validation_messages
from tpo.batches.lines import RawLine, RefusedLine
from tpo.batches.tables import BatchLine
from tpo.core.errors import InvalidInputError
from tpo.jobs.submission import Submit
from tpo.jobs.view import JobView
from tpo.json_limits import check_structure
from tpo.openai import views
from tpo.openai.requests import ChatRequest, JobRequest, ResponseRequest
from tpo.wire import StoredText, Wire

Endpoint = Literal["/v1/responses", "/v1/chat/completions"]
_REQUESTS: dict[str, type[JobRequest]] = {"/v1/responses": ResponseRequest, "/v1/chat/completions": ChatRequest}
MAX_CUSTOM_ID_LENGTH = 512


class _Line(Wire):
    custom_id: Annotated[StoredText, StringConstraints(min_length=1, max_length=MAX_CUSTOM_ID_LENGTH)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any] = Field(strict=True)


class RequestLine(NamedTuple):
    """A line that asks for a job."""

    custom_id: str
    body: JobRequest

    def submission(self) -> Submit:
        """Return the job that the line asks for. Raises InvalidInputError."""
        return self.body.submission()

    def with_request_names(self, error: InvalidInputError) -> InvalidInputError:
        """Return an error about the submission under the name that its field has in the line."""
        return self.body.with_request_names(error)


class OpenAILines:
    """OpenAI's format of a batch's files: JSON lines with `custom_id`, `method`, `url` and `body`."""

    def parse(self, line: RawLine, endpoint: str) -> RequestLine | RefusedLine:
        """Read one line of the input."""
        if line.text is None:
            return RefusedLine(None, InvalidInputError("The line is too long."))
        try:
            check_structure(line.content)
            fields = from_json(line.content, allow_inf_nan=False)
        except InvalidInputError as error:
            return RefusedLine(None, error)
        except ValueError:
            return RefusedLine(None, InvalidInputError("The line is not JSON in UTF-8, or it is nested too deeply."))
        if not isinstance(fields, dict):
            return RefusedLine(None, InvalidInputError("The line must be a JSON object."))
        try:
            return _request(fields, endpoint)
        except ValidationError as error:
            return RefusedLine(_custom_id(fields), validation_messages.invalid(error))
        except InvalidInputError as error:
            return RefusedLine(_custom_id(fields), error)

    def render(self, endpoint: str, line: BatchLine, job: JobView | None) -> bytes:
        """Write one line of the output or of the errors, with its end."""
        response: dict[str, Any] | None = None
        error: dict[str, Any] | None = None
        if job is not None and job.output is not None:
            body = views.response(job) if endpoint == "/v1/responses" else views.chat_completion(job)
            response = {"status_code": 200, "request_id": job.id, "body": body.model_dump()}
        else:
            code, message = _failure(line, job)
            error = {"code": code, "message": message, "param": line.error_param, "line": line.number}
        result = {
            "id": f"batch_req_{line.batch_id.removeprefix('batch_')}_{line.number}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        return json.dumps(result, separators=(",", ":")).encode() + b"\n"


def _request(fields: dict[str, Any], endpoint: str) -> RequestLine:
    parsed = _Line.model_validate(fields)
    if parsed.url != endpoint:
        raise InvalidInputError(f"url: must be the batch's endpoint, {endpoint}.", "url")
    body = _REQUESTS[endpoint].model_validate(parsed.body)
    if body.stream:
        raise InvalidInputError("stream: is not supported in batches.", "stream")
    if "external_id" in (body.tpo or {}):
        message = "tpo.external_id: is not supported in batches. Identify a line by its custom_id."
        raise InvalidInputError(message, "tpo.external_id")
    return RequestLine(parsed.custom_id, body)


def _failure(line: BatchLine, job: JobView | None) -> tuple[str, str]:
    """Return code and message of a line that has no answer."""
    if line.error_code is not None:
        return line.error_code, line.error_message or ""
    if job is None:
        return "job_deleted", "The job of this line was deleted before the batch ended."
    return views.failure(job)


def _custom_id(fields: dict[str, Any]) -> str | None:
    """Return the id under which a refused line is reported, if it has one that can be stored."""
    given = fields.get("custom_id")
    usable = isinstance(given, str) and 0 < len(given) <= MAX_CUSTOM_ID_LENGTH and "\x00" not in given
    return given if usable else None
