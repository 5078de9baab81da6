"""The errors of the library, in one tree. `code`, `status` (over HTTP) and `title` are class attributes.

TPOError                            500
├── InvalidInputError               422  the caller can fix it: names the field and says what to do
│   └── UnknownModelError           422  no worker serves that policy or reward model
├── IdempotencyConflictError        422  an Idempotency-Key was already used with a different body
├── NotFoundError                   404  nothing has that id
│   ├── JobNotFoundError, KeyNotFoundError, UploadNotFoundError
│   └── ModelNotFoundError, BatchNotFoundError, WebhookNotFoundError
├── ConflictError                   409  the state of a resource does not allow the request; a retry does not help
│   ├── ExternalIdTakenError        409  another request created a job with this external_id
│   └── WrongStateError             409  the status of a job or batch does not allow the request
├── KeyExpiredError                 401  the API key was valid until a time that has passed
├── QuotaExceededError              429  the tenant exceeds one of its limits for now
├── StoreUnavailableError           503  the database cannot be reached or cannot work for now; the message says why
│   ├── DatabaseRefusedError        503  its URL or file is unusable until somebody fixes it; no process starts with it
│   └── StatementFailedError        500  it refuses a statement: an error of ours, of its driver or of a proxy
├── SchemaOutOfDateError                 the database's schema is not that of this version
├── BrokerUnavailableError               the broker cannot be reached or accepts nothing for now; the message says why
├── JobError                             ends a job; `code` is stored in the job's record
│   ├── ContextTooLongError              a prompt does not fit the model's context
│   ├── PromptRefusedError               the model's chat template or vocabulary cannot express the conversation
│   ├── NoUsableSampleError              no sample can be scored
│   └── BadReplyError                    a back end's reply does not fit the request
├── BackendUnavailableError              a model cannot be reached or is out of memory for now; the job is retried
├── ModelRefusedError                    a model cannot be loaded; raised before any job is claimed
├── CallInterruptedError                 not a failure: the job has to stop between two steps
└── LeaseLostError                       another worker holds the job; nothing may be written
"""

import traceback
from collections.abc import Iterator
from typing import Literal

InterruptReason = Literal["cancelled", "drain", "lease_lost", "deadline", "paused", "queue_paused", "quarantine"]


class TPOError(Exception):
    """Something went wrong in TPO."""

    status: int = 500
    code: str | None = "internal_error"
    param: str | None = None
    """The invalid field of the request; None if it is not a single field."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class InvalidInputError(TPOError):
    """The input is not valid."""

    status = 422
    code = "invalid_input"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(InvalidInputError):
    """No worker serves that model."""

    code = "unknown_model"


class JobError(TPOError):
    """The job cannot continue; another attempt would end in the same way."""

    code = "job_error"


class ContextTooLongError(JobError):
    """The prompt does not fit the model's context."""

    code = "context_too_long"


class PromptRefusedError(JobError):
    """The model cannot express the conversation."""

    code = "prompt_refused"


class NoUsableSampleError(JobError):
    """No sampled response can be used."""

    code = "no_usable_sample"


class BadReplyError(JobError):
    """The back end's reply does not fit the request."""

    code = "bad_reply"


class BackendUnavailableError(TPOError):
    """The model cannot be used for now; the job will be retried."""

    code = "backend_unavailable"


class ModelRefusedError(TPOError):
    """The model cannot be loaded."""


class CallInterruptedError(TPOError):
    """The job has to stop."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(f"The job has to stop: {reason}.")
        self.reason: InterruptReason = reason


class LeaseLostError(TPOError):
    """Another worker owns this job now."""


class StoreUnavailableError(TPOError):
    """The database cannot be reached."""

    status = 503
    code = "database_unavailable"


class DatabaseRefusedError(StoreUnavailableError):
    """The database's URL or file cannot be used until somebody fixes it."""


class StatementFailedError(StoreUnavailableError):
    """The database refuses a statement."""

    status = 500
    code = "internal_error"


class SchemaOutOfDateError(TPOError):
    """The database's schema is not that of this version: run `tpo db upgrade`."""


class BrokerUnavailableError(TPOError):
    """The broker cannot be reached."""

    code = "queue_unavailable"


class IdempotencyConflictError(TPOError):
    """This Idempotency-Key was already used with a different body. Use a new key for each new request."""

    status = 422
    param = "Idempotency-Key"
    code = "idempotency_key_reused"


class ConflictError(TPOError):
    """The state of the resource does not allow that; a retry does not help."""

    status = 409
    code = "conflict"


class ExternalIdTakenError(ConflictError):
    """Another request created a job with this external_id."""

    code = "external_id_taken"


class WrongStateError(ConflictError):
    """The status of the job or batch does not allow the request."""

    code = "wrong_state"


class KeyExpiredError(TPOError):
    """The API key has expired. Ask the operator of this server for a new one (tpo keys create)."""

    status = 401
    code = "invalid_api_key"


class QuotaExceededError(TPOError):
    """The tenant requests more than its limits allow."""

    status = 429

    def __init__(self, message: str, code: str, retry_after: float, limit: int, remaining: int, reset: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.limit = limit
        self.remaining = remaining
        self.reset = reset


class NotFoundError(TPOError):
    """There is nothing with this id."""

    status = 404
    code = "not_found"


class JobNotFoundError(NotFoundError):
    """There is no job with this id."""

    code = "job_not_found"


class KeyNotFoundError(NotFoundError):
    """There is no API key with this id."""

    code = "key_not_found"


class UploadNotFoundError(NotFoundError):
    """There is no file with this id."""

    code = "file_not_found"


class ModelNotFoundError(NotFoundError):
    """No live worker serves this policy. GET /v1/models lists the policies that are served."""

    code = "model_not_found"


class BatchNotFoundError(NotFoundError):
    """There is no batch with this id."""

    code = "batch_not_found"


class WebhookNotFoundError(NotFoundError):
    """There is no webhook with this id."""

    code = "webhook_not_found"


def frames(error: BaseException) -> str:
    """Format the tracebacks of an error and its causes, without messages and values.

    Messages of databases and validators quote users' texts.
    """
    return "\ncaused by ".join(
        type(cause).__qualname__ + "\n" + "".join(traceback.format_tb(cause.__traceback__)).rstrip()
        for cause in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and the chain of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
