"""The errors of the client, in one tree.

ClientError
├── APIConnectionError             no connection, or no answer in time, after all retries
├── APIError                the server answered with an error: status, code, param, request_id
│   ├── BadRequestError      400, 413, 415, 422: the caller can mend it
│   ├── AuthenticationError  401, 403
│   ├── NotFoundError            404
│   ├── ConflictError            409: the job's state does not allow it
│   ├── RateLimitError         429, after all retries: retry_after
│   └── InternalServerError        5xx, after all retries
├── JobFailedError         a job of a batch ended without success; it stands in `job`
└── WaitTimeoutError           a job has not ended in the time that was given; it goes on
"""

from collections.abc import Mapping
from typing import Any

import httpx

from tpo.client.types import Job
from tpo.core.errors import TPOError


class ClientError(TPOError):
    """Something that was asked of the server did not come about."""

    again = False
    """Whether the same request may go better next time."""
    retry_after: float | None = None
    """Seconds that the server asks for before that."""


class APIConnectionError(ClientError):
    """The server cannot be reached."""

    again = True


class JobFailedError(ClientError):
    """The job ended without success."""

    def __init__(self, job: Job) -> None:
        failure, incomplete = job["error"], job["incomplete_details"]
        reason = failure["message"] if failure else incomplete and incomplete["reason"]
        super().__init__(f"{job['id']} is {job['status']}" + (f": {reason}" if reason else ""))
        self.job = job


class WaitTimeoutError(ClientError):
    """The job has not ended in the time that was given."""


class APIError(ClientError):
    """The server answered with an error."""

    def __init__(self, message: str, status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")
        self.request_id = headers.get("x-request-id")
        self.retry_after = _seconds_of(headers.get("retry-after"))
        told = headers.get("x-should-retry")
        self.again = status in _AGAIN if told is None else told == "true"


class BadRequestError(APIError):
    """The request is not valid."""


class AuthenticationError(APIError):
    """The key is missing, wrong or revoked."""


class NotFoundError(APIError):
    """There is nothing with this id."""


class ConflictError(APIError):
    """The job's state does not allow that."""


class RateLimitError(APIError):
    """A quota is used up."""


class InternalServerError(APIError):
    """Something went wrong in the server."""


_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_KINDS: dict[int, type[APIError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: BadRequestError,
    415: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
}


def of_response(response: httpx.Response) -> APIError:
    """What a problem+json says, with the field that it is about. The response must have been read."""
    error: Mapping[str, Any] = {}
    message = f"the server answered {response.status_code} {response.reason_phrase}"
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        error = found if isinstance(found := problem.get("error"), dict) else {}
        message = str(problem.get("detail") or error.get("message") or problem.get("title") or message)
    if (param := error.get("param")) and param not in message:
        message = f"{param}: {message}"
    status = response.status_code
    kind = _KINDS.get(status, InternalServerError if status >= 500 else APIError)
    return kind(message, status, error, response.headers)


def _seconds_of(retry_after: str | None) -> float | None:
    """The header `Retry-After` in seconds; a date, which our server never sends, counts as none."""
    try:
        return max(0.0, float(retry_after)) if retry_after is not None else None
    except ValueError:
        return None
