"""The errors of the library, in one tree.

TPOError
├── InvalidInput            the caller can mend it: names the field and says what to do
│   └── UnknownModel        no worker serves that policy or reward model
├── JobError                a job ends with it; `code` stands in the job's record
│   ├── ContextTooLong      a prompt does not fit the model's context
│   ├── PromptRefused       the model's chat template or vocabulary cannot express the conversation
│   ├── NoUsableSample      no sampled response can be scored
│   └── BadReply            a back end answered something that is not an answer
├── BackendUnavailable      a model cannot be reached or is out of memory for now: worth another attempt
├── ModelRefused            a model cannot be loaded; raised before any job is taken
├── Interrupted             not a failure: a job was told to stop between two steps
├── LeaseLost               another worker owns the job; nothing may be written
├── JobNotFound             there is no such job
├── KeyNotFound             there is no such API key
├── NotFound                there is no such file, model, batch or webhook
│   ├── FileNotFound
│   ├── ModelNotFound
│   ├── BatchNotFound
│   └── WebhookNotFound
├── SameKeyOtherBody        an Idempotency-Key came with another body before
├── Conflict                the state of something does not allow it; asking again does not help
│   ├── ExternalIdTaken     another request made a job with this external_id
│   └── WrongState          a job or a batch is not in a state in which that can be done
├── QuotaExceeded           the tenant asks for more than it may, for now
├── StoreUnavailable        the database cannot be reached, or cannot do its work for now: says why
│   └── DatabaseRefused     its URL or file cannot be used until somebody mends it: refused at a start
├── SchemaOutOfDate         the database's schema is not the one of this version
└── QueueUnavailable        the broker cannot be reached, or takes nothing for now: says why
"""

import traceback
from collections.abc import Iterator
from typing import Literal

InterruptReason = Literal["cancelled", "drain", "lease_lost", "deadline", "paused", "queue_paused"]


class TPOError(Exception):
    """Something went wrong in TPO."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class InvalidInput(TPOError):
    """The input is not valid."""

    code = "invalid_input"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(InvalidInput):
    """No worker serves that model."""

    code = "unknown_model"


class JobError(TPOError):
    """The job cannot go on; another attempt would end the same way."""

    code = "job_error"


class ContextTooLong(JobError):
    """The prompt does not fit the model's context."""

    code = "context_too_long"


class PromptRefused(JobError):
    """The model cannot express the conversation."""

    code = "prompt_refused"


class NoUsableSample(JobError):
    """No sampled response can be used."""

    code = "no_usable_sample"


class BadReply(JobError):
    """The back end's reply does not answer the request."""

    code = "bad_reply"


class BackendUnavailable(TPOError):
    """The model cannot be used for now; the job will be tried again."""

    code = "backend_unavailable"


class ModelRefused(TPOError):
    """The model cannot be loaded."""


class Interrupted(TPOError):
    """The job was told to stop."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(f"The job was told to stop: {reason}.")
        self.reason: InterruptReason = reason


class LeaseLost(TPOError):
    """Another worker owns this job now."""


class JobNotFound(TPOError):
    """There is no job with this id."""


class StoreUnavailable(TPOError):
    """The database cannot be reached."""


class DatabaseRefused(StoreUnavailable):
    """The database's URL or file cannot be used until somebody mends it."""


class SchemaOutOfDate(TPOError):
    """The database's schema is not the one of this version: run `tpo db upgrade`."""


class QueueUnavailable(TPOError):
    """The broker cannot be reached."""

    code = "queue_unavailable"


class KeyNotFound(TPOError):
    """There is no API key with this id."""


class SameKeyOtherBody(TPOError):
    """This Idempotency-Key came with another body before: take a new key for a new request."""

    code = "idempotency_key_reused"


class Conflict(TPOError):
    """The state of something does not allow that; asking again does not help."""

    code = "conflict"


class ExternalIdTaken(Conflict):
    """Another request made a job with this external_id."""

    code = "external_id_taken"


class WrongState(Conflict):
    """The job or batch is not in a state in which that can be done."""

    code = "wrong_state"


class QuotaExceeded(TPOError):
    """The tenant asks for more than it may."""

    def __init__(self, message: str, code: str, retry_after: float, limit: int, remaining: int, reset: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.limit = limit
        self.remaining = remaining
        self.reset = reset


class NotFound(TPOError):
    """There is nothing with this id."""

    code = "not_found"


class FileNotFound(NotFound):
    """There is no file with this id."""

    code = "file_not_found"


class ModelNotFound(NotFound):
    """No live worker serves this policy."""

    code = "model_not_found"


class BatchNotFound(NotFound):
    """There is no batch with this id."""

    code = "batch_not_found"


class WebhookNotFound(NotFound):
    """There is no webhook with this id."""

    code = "webhook_not_found"


def frames(error: BaseException) -> str:
    """Where an error came from, without its message and values: those of a database or a validator quote texts."""
    return "\ncaused by ".join(
        type(cause).__qualname__ + "\n" + "".join(traceback.format_tb(cause.__traceback__)).rstrip()
        for cause in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
