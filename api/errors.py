"""Convert errors to HTTP responses: problem details (RFC 9457) with the `error` object of OpenAI's API."""

import logging
import math
from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Scope

from api import schemas
from tpo import validation_messages
from tpo.core.errors import QuotaExceededError, TPOError, frames

logger = logging.getLogger("api")

RETRY_AFTER_SECONDS = 5
_SHOWN_CHARACTERS = 1000

CODES = {
    400: "invalid_json",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
DETAILS = {
    400: "The body is not JSON in UTF-8, or it is nested too deeply.",
    401: "Send your API key with the header Authorization: Bearer KEY.",
    404: "There is no such path. /docs lists the paths of this API.",
    405: "This path does not support the method. The Allow header lists the supported methods.",
    500: "Internal server error. The server's log has the details under the x-request-id of this response.",
}
"""Default messages, by status."""
BODY_TOO_LARGE = "The body is larger than {} bytes."
JSON_REQUIRED = "Send JSON, with the header Content-Type: application/json."
FORM_REQUIRED = "Send a form, with the header Content-Type: multipart/form-data."
HOST_NOT_ALLOWED = "This server does not answer to that Host header. TPO_ALLOWED_HOSTS lists the names that it has."
ORIGIN_NOT_ALLOWED = "A web page of another origin asks for a change. TPO_ALLOWED_ORIGINS lists those that may."
TOO_MANY_STREAMS = "The server has as many streams as it may have. Poll the job instead, or retry later."
SERVER_STOPPING = "The server is stopping. Check whether the request took effect before you retry it."
JOB_STILL_RUNNING = (
    "The job {job_id} is still running after {seconds:g} s and continues. Poll /v1/responses/{response_id}, or send "
    "background: true."
)


def problem(
    scope: Scope,
    status: int,
    *,
    detail: str | None = None,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    checks: schemas.Checks | None = None,
) -> JSONResponse:
    """Return the HTTP response for an error."""
    body = problem_body(_clean(scope["path"]), status, detail, code, param, checks)
    response_headers = dict(headers or {})
    if status == 503:
        response_headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    if status == 409:
        response_headers["x-should-retry"] = "false"  # OpenAI's client retries a 409 twice, which never helps here
    return JSONResponse(
        body.model_dump(exclude={"checks"} if checks is None else None),
        status,
        response_headers,
        media_type="application/problem+json",
    )


def problem_body(
    instance: str,
    status: int,
    detail: str | None = None,
    code: str | None = None,
    param: str | None = None,
    checks: schemas.Checks | None = None,
) -> schemas.Problem:
    """Return the body of an error's response."""
    title = HTTPStatus(status).phrase
    message = _clean(detail or DETAILS.get(status, title))
    code = code or CODES.get(status, title.lower().replace(" ", "_"))
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return schemas.Problem(
        type=f"urn:tpo:problem:{code}",
        title=title,
        status=status,
        detail=message,
        instance=instance,
        error=schemas.ErrorBody(message=message, type=kind, code=code, param=param and _clean(param)),
        checks=checks,
    )


def install(app: FastAPI) -> None:
    """Install the handlers that convert the errors of the library and of FastAPI to problem details."""
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(TPOError, _library_error)
    app.add_exception_handler(HTTPException, _http)


def error_response(scope: Scope, error: TPOError) -> JSONResponse:
    """Return the HTTP response for one of the library's errors, from its class attributes."""
    request_id = scope["state"]["request_id"]
    if error.status == 500:
        log_unexpected(error, request_id)
        return problem(scope, 500)
    headers = None
    if error.status == 503:
        logger.warning("request %s: %s", request_id, error)
    if isinstance(error, QuotaExceededError):
        headers = {
            "retry-after": str(max(1, math.ceil(error.retry_after))),
            **rate_limit_headers(error.limit, error.remaining, error.reset),
        }
    return problem(scope, error.status, detail=detail_of(error), code=error.code, param=error.param, headers=headers)


def detail_of(error: TPOError) -> str:
    """Return the message of one of the library's errors for the client."""
    return f"{error} Nothing was changed." if error.status == 503 else str(error)


def rate_limit_headers(limit: int, remaining: int, reset: float) -> dict[str, str]:
    """Return the headers that report the remaining quota, named as in OpenAI's API. `reset` is in seconds."""
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
        "x-ratelimit-reset-requests": f"{reset:.3f}s",
    }


def log_unexpected(error: BaseException, request_id: str) -> None:
    """Log the tracebacks of an error without its message, which may quote users' texts."""
    logger.error("request %s failed unexpectedly: %s", request_id, frames(error))


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    fields = [{**e, "loc": tuple(e["loc"][1:])} for e in errors]  # without "query" or the like
    refusal = validation_messages.from_errors(cast(list[ErrorDetails], fields))
    return problem(request.scope, 422, detail=str(refusal), code=refusal.code, param=refusal.param)


async def _library_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(request.scope, cast(TPOError, error))


async def _http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        return problem(request.scope, 500)
    detail = None if error.status_code in DETAILS else error.detail
    headers = {"allow": _methods(request)} if error.status_code == 405 else error.headers
    return problem(request.scope, error.status_code, detail=detail, headers=headers)


def _methods(request: Request) -> str:
    """Return the methods that a path supports. Starlette reports only those of the first matching route."""
    variants = ({**request.scope, "method": method} for method in HTTPMethod)
    routes = request.app.routes
    return ", ".join(scope["method"] for scope in variants if any(r.matches(scope)[0] is Match.FULL for r in routes))


def _clean(text: str) -> str:
    """Return a text that is short and can be encoded as UTF-8."""
    return text[:_SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
