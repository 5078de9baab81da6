"""The errors of the client, in one tree.

ClientError
├── APIConnectionError       no connection, or no response in time, after all retries
├── APIError                 the server responded with an error: status, code, param, request_id
│   ├── BadRequestError      400, 413, 415, 422: the request must be corrected
│   ├── AuthenticationError  401, 403
│   ├── NotFoundError        404
│   ├── ConflictError        409: the state of the job does not allow the request
│   ├── RateLimitError       429, after all retries: retry_after
│   └── InternalServerError  5xx, after all retries
├── JobFailedError           a job ended without success; it is in `job`
└── WaitTimeoutError         a job did not end in the given time; it continues
"""

from collections.abc import Mapping
from typing import Any

import httpx

from tpo.client.types import Job
from tpo.core.errors import TPOError


class ClientError(TPOError):
    """A request to the server failed."""

    retryable = False
    """Whether a retry of the same request may succeed."""
    retry_after: float | None = None
    """Seconds that the server asks the client to wait before a retry."""


class APIConnectionError(ClientError):
    """The server cannot be reached."""

    retryable = True


class JobFailedError(ClientError):
    """The job ended without success."""

    def __init__(self, job: Job) -> None:
        failure, incomplete = job["error"], job["incomplete_details"]
        reason = failure["message"] if failure else incomplete and incomplete["reason"]
        super().__init__(f"{job['id']} is {job['status']}" + (f": {reason}" if reason else ""))
        self.job = job


class WaitTimeoutError(ClientError):
    """The job did not end in the given time."""


class APIError(ClientError):
    """The server responded with an error."""

    def __init__(self, message: str, status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")
        self.request_id = headers.get("x-request-id")
        self.retry_after = _seconds_of(headers.get("retry-after"))
        should_retry = headers.get("x-should-retry")
        self.retryable = status in _RETRYABLE if should_retry is None else should_retry == "true"


class BadRequestError(APIError):
    """The request is not valid."""


class AuthenticationError(APIError):
    """The key is missing, wrong, revoked or expired."""


class NotFoundError(APIError):
    """There is no resource with this id."""


class ConflictError(APIError):
    """The state of the job does not allow the request."""


class RateLimitError(APIError):
    """A quota is used up."""


class InternalServerError(APIError):
    """The server failed."""


_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_BY_STATUS: dict[int, type[APIError]] = {
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


def error_from_response(response: httpx.Response) -> APIError:
    """Build the error of a response from its problem+json. The response must have been read."""
    error: Mapping[str, Any] = {}
    message = f"the server responded with {response.status_code} {response.reason_phrase}"
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
    error_class = _BY_STATUS.get(status, InternalServerError if status >= 500 else APIError)
    return error_class(message, status, error, response.headers)


def _seconds_of(retry_after: str | None) -> float | None:
    """Parse the header `Retry-After` in seconds. A date is ignored, because the server never sends one."""
    try:
        return max(0.0, float(retry_after)) if retry_after is not None else None
    except ValueError:
        return None
