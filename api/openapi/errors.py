"""Which errors an address can answer, each with an example, for the description of the API."""

from typing import Any

from api import schemas
from api.errors import problem_body
from tpo.webhooks.endpoints import MAX_WEBHOOKS

Answers = dict[int | str, dict[str, Any]]


def _answers(status: int, description: str, **examples: str | tuple[str, str]) -> Answers:
    """An error by its status, and an example of each code: what it says, and of which parameter."""
    shown = {}
    for code, said in examples.items():
        message, param = (said, None) if isinstance(said, str) else said
        shown[code] = {"value": problem_body("/v1/…", status, message, code, param).model_dump(exclude={"checks"})}
    content = {"application/json": {"examples": shown}}
    return {status: {"model": schemas.Problem, "description": description, "content": content}}


_INVALID: dict[str, str | tuple[str, str]] = {
    "invalid_input": ("limit: Input should be less than or equal to 100", "limit")
}
_SAID: dict[str, str | tuple[str, str]] = {
    "idempotency_key_reused": (
        "This Idempotency-Key was already used with a different body. Use a new key for each new request.",
        "Idempotency-Key",
    )
}
_UNSERVED: dict[str, str | tuple[str, str]] = {
    "unknown_model": ("No worker serves the policy 'gpt-9'; there are: demo.", "model")
}

ALWAYS: Answers = {
    **_answers(
        401,
        "The server has keys, and the request brings none of them",
        invalid_api_key="Send your API key with the header Authorization: Bearer KEY.",
    ),
    **_answers(
        403,
        "A web page of another origin asks for a change",
        origin_not_allowed="A web page of another origin asks for a change; TPO_ALLOWED_ORIGINS lists those that may.",
    ),
    **_answers(
        421,
        "The server does not have the name of the Host header",
        host_not_allowed="This server does not answer to that Host header; TPO_ALLOWED_HOSTS lists the names that it "
        "has.",
    ),
    **_answers(500, "Our fault", internal_error="Something went wrong on our side."),
}
"""Of every address under /v1."""
UNAVAILABLE = _answers(
    503,
    "The database is away, or the server stops: try again after `Retry-After`",
    database_unavailable="The database cannot be reached. Nothing was changed.",
    too_many_streams="The server has as many streams as it may have. Poll the job instead, or try again later.",
    server_stopping="The server stops. Look whether this took effect before you send it again.",
)
NOT_READY = _answers(503, "Not ready: `checks` says what is missing", not_ready="Missing: worker.")
INVALID = _answers(422, "Not valid: says what", **_INVALID)
INVALID_OR_SAID = _answers(422, "Not valid: says what", **_INVALID, **_SAID)
INVALID_JOB = _answers(422, "Not valid: says what", **_INVALID, **_UNSERVED, **_SAID)
NOT_FOUND = _answers(404, "There is no job with this id", job_not_found="There is no job with this id.")
NOT_SHOWN = _answers(
    404, "Not for the tenant of this key", not_found="There is nothing at this address; /docs lists what there is."
)
FILE_NOT_FOUND = _answers(404, "There is no file with this id", file_not_found="There is no file with this id.")
BATCH_NOT_FOUND = _answers(404, "There is no batch with this id", batch_not_found="There is no batch with this id.")
MODEL_NOT_FOUND = _answers(
    404,
    "No live worker serves it",
    model_not_found="No live worker serves this policy; /v1/models lists those that are served.",
)
WEBHOOK_NOT_FOUND = _answers(
    404, "There is no webhook with this id", webhook_not_found="There is no webhook with this id."
)
UNREADABLE: Answers = {
    **_answers(400, "Not JSON", invalid_json="The body is not JSON in UTF-8, or it is nested too deeply."),
    **_answers(413, "Larger than the server allows", body_too_large="The body is larger than 2662144 bytes."),
    **_answers(
        415,
        "Not sent as what it must be",
        unsupported_media_type="Send JSON, with the header Content-Type: application/json.",
    ),
}
UPLOAD: Answers = {
    **_answers(413, "Larger than the server allows", body_too_large="The body is larger than 200065536 bytes."),
    **_answers(
        415,
        "Not sent as what it must be",
        unsupported_media_type="Send a form, with the header Content-Type: multipart/form-data.",
    ),
}
STILL_RUNNING = _answers(
    504,
    "The job takes longer than the server waits; it goes on",
    still_running="The job job_… still runs after 300 s and goes on: poll /v1/responses/resp_…, or ask with "
    "background: true.",
)
CONFLICT = _answers(
    409,
    "The job's state does not allow it; do not retry",
    wrong_state="The job is completed: it cannot be paused.",
)
TAKEN = _answers(
    409,
    "Another request made a job with this `external_id`; do not retry",
    external_id_taken="Another request made a job with this external_id.",
)
IN_USE = _answers(
    409,
    "A batch still reads it; do not retry",
    conflict="The file file-… is read by a batch that has not ended.",
)
TOO_MANY_WEBHOOKS = _answers(
    409,
    "The tenant has as many as it may; do not retry",
    conflict=f"There are {MAX_WEBHOOKS} webhooks already: delete one first.",
)
SWITCHED_OFF = _answers(
    409, "It is switched off; do not retry", conflict="The webhook is switched off: enable it first."
)
NOT_ENDED = _answers(
    409, "It has not ended; do not retry", wrong_state="The batch batch_… has not ended: cancel it first."
)
TOO_MANY = _answers(
    429,
    "A quota is used up: wait for `Retry-After`",
    rate_limit_exceeded="60 jobs were made within a minute, and 60 are allowed.",
    too_many_jobs_in_flight="100 jobs may be in flight, and so many are: wait until one has ended.",
)
NO_ANSWER = _answers(
    500,
    "The job ended without an answer, or our fault; do not retry the former",
    job_cancelled="The job job_… ended as cancelled without an answer.",
    internal_error="Something went wrong on our side.",
)
