"""OpenAPI `responses` of the routes' errors, with an example of each code.

Messages come from the errors themselves, so that the document shows the texts that the server sends.
"""

from typing import Any

from api import schemas
from api.errors import (
    BODY_TOO_LARGE,
    CODES,
    DETAILS,
    FORM_REQUIRED,
    HOST_NOT_ALLOWED,
    JOB_STILL_RUNNING,
    JSON_REQUIRED,
    ORIGIN_NOT_ALLOWED,
    SERVER_STOPPING,
    TOO_MANY_STREAMS,
    detail_of,
    problem_body,
)
from tpo.batches.files import FILE_IN_USE
from tpo.batches.requests import BATCH_NOT_ENDED
from tpo.core.errors import (
    BatchNotFoundError,
    ConflictError,
    ExternalIdTakenError,
    IdempotencyConflictError,
    InvalidInputError,
    JobNotFoundError,
    ModelNotFoundError,
    StoreUnavailableError,
    TPOError,
    UnknownModelError,
    UploadNotFoundError,
    WebhookNotFoundError,
    WrongStateError,
)
from tpo.jobs.lifecycle import CANNOT_BE_PAUSED
from tpo.jobs.quotas import TOO_MANY_IN_FLIGHT, TOO_MANY_PER_MINUTE, TOO_MANY_STORED_BYTES
from tpo.jobs.submission import UNKNOWN_POLICY
from tpo.openai.views import WITHOUT_OUTPUT
from tpo.webhooks.endpoints import TOO_MANY_WEBHOOKS, WEBHOOK_DISABLED

Responses = dict[int | str, dict[str, Any]]


def _responses(status: int, description: str, *errors: TPOError, **messages: str) -> Responses:
    """Describe the responses of one status, with examples: errors of the library, and messages by their code."""
    examples = [(error.code, detail_of(error), error.param) for error in errors]
    examples += [(code, message, None) for code, message in messages.items()]
    shown = {
        code: {"value": problem_body("/v1/…", status, message, code, param).model_dump(exclude={"checks"})}
        for code, message, param in examples
    }
    content = {"application/json": {"examples": shown}}
    return {status: {"model": schemas.Problem, "description": description, "content": content}}


def _default(status: int, description: str) -> Responses:
    """Describe the responses of a status that has one code and one message."""
    return _responses(status, description, **{CODES[status]: DETAILS[status]})


_INVALID_INPUT = InvalidInputError("limit: Input should be less than or equal to 100", "limit")
_UNKNOWN_MODEL = UnknownModelError(UNKNOWN_POLICY.format("gpt-9", "demo"), "model")

ALWAYS: Responses = {
    **_default(401, "The server has keys, and the request contains none of them"),
    **_responses(403, "A web page of another origin asks for a change", origin_not_allowed=ORIGIN_NOT_ALLOWED),
    **_responses(421, "The Host header is not a name of the server", host_not_allowed=HOST_NOT_ALLOWED),
    **_default(500, "Internal server error"),
}
"""Responses of every path under /v1."""
UNAVAILABLE = _responses(
    503,
    "The database cannot be reached, the server is stopping, or it has no free stream: retry after `Retry-After`",
    StoreUnavailableError(),
    too_many_streams=TOO_MANY_STREAMS,
    server_stopping=SERVER_STOPPING,
)
NOT_READY = _responses(503, "Not ready: `checks` names what is missing", not_ready="Missing: worker.")
INVALID = _responses(422, "The request is invalid", _INVALID_INPUT)
INVALID_OR_REUSED = _responses(422, "The request is invalid", _INVALID_INPUT, IdempotencyConflictError())
INVALID_JOB = _responses(422, "The request is invalid", _INVALID_INPUT, _UNKNOWN_MODEL, IdempotencyConflictError())
NOT_FOUND = _responses(404, "There is no job with this id", JobNotFoundError())
NOT_SHOWN = _default(404, "The tenant of this key has no access to the metrics")
FILE_NOT_FOUND = _responses(404, "There is no file with this id", UploadNotFoundError())
BATCH_NOT_FOUND = _responses(404, "There is no batch with this id", BatchNotFoundError())
MODEL_NOT_FOUND = _responses(404, "No live worker serves this policy", ModelNotFoundError())
WEBHOOK_NOT_FOUND = _responses(404, "There is no webhook with this id", WebhookNotFoundError())
UNREADABLE: Responses = {
    **_default(400, "The body is not JSON"),
    **_responses(413, "The body is too large", body_too_large=BODY_TOO_LARGE.format(2_662_144)),
    **_responses(415, "The body has another media type", unsupported_media_type=JSON_REQUIRED),
}
UPLOAD: Responses = {
    **_responses(413, "The body is too large", body_too_large=BODY_TOO_LARGE.format(200_065_536)),
    **_responses(415, "The body has another media type", unsupported_media_type=FORM_REQUIRED),
}
STILL_RUNNING = _responses(
    504,
    "The job is still running after the server's maximum wait; it continues",
    still_running=JOB_STILL_RUNNING.format(job_id="job_…", response_id="resp_…", seconds=300),
)
CONFLICT = _responses(
    409, "The job's status does not allow it; do not retry", WrongStateError(CANNOT_BE_PAUSED.format("completed"))
)
TAKEN = _responses(409, "Another request created a job with this `external_id`; do not retry", ExternalIdTakenError())
IN_USE = _responses(
    409, "A batch that has not ended reads the file; do not retry", ConflictError(FILE_IN_USE.format("file-…"))
)
TOO_MANY_WEBHOOKS_EXIST = _responses(
    409, "The tenant has the maximum number of webhooks; do not retry", ConflictError(TOO_MANY_WEBHOOKS)
)
DISABLED = _responses(409, "The webhook is disabled; do not retry", ConflictError(WEBHOOK_DISABLED))
NOT_ENDED = _responses(409, "The batch has not ended; do not retry", WrongStateError(BATCH_NOT_ENDED.format("batch_…")))
TOO_MANY = _responses(
    429,
    "A quota is exceeded: retry after `Retry-After`",
    rate_limit_exceeded=TOO_MANY_PER_MINUTE.format(60),
    too_many_jobs_in_flight=TOO_MANY_IN_FLIGHT.format(100),
    too_many_stored_bytes=TOO_MANY_STORED_BYTES.format(10**9),
)
NO_ANSWER = _responses(
    500,
    "The job ended without an answer (do not retry), or an internal server error",
    job_cancelled=WITHOUT_OUTPUT.format(job_id="job_…", status="cancelled"),
    internal_error=DETAILS[500],
)
