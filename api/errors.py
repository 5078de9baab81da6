"""Errors become HTTP here and nowhere else: RFC 9457, and beside it the `error` that OpenAI's clients read."""

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
_DETAILS = {
    400: "The body is not JSON in UTF-8, or it is nested too deeply.",
    404: "There is nothing at this address; /docs lists what there is.",
    405: "This address does not know that method; the Allow header lists those that it knows.",
    500: "Something went wrong on our side. The x-request-id of this answer finds it in the log.",
}


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
    """The answer that tells of an error."""
    body = problem_body(_clean(scope["path"]), status, detail, code, param, checks)
    answer = dict(headers or {})
    if status == 503:
        answer["retry-after"] = str(RETRY_AFTER_SECONDS)
    if status == 409:
        answer["x-should-retry"] = "false"  # OpenAI's client repeats a 409 twice; none of ours is mended by that
    return JSONResponse(
        body.model_dump(exclude={"checks"} if checks is None else None),
        status,
        answer,
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
    """What an answer says of an error."""
    title = HTTPStatus(status).phrase
    message = _clean(detail or _DETAILS.get(status, title))
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
    """Answer the library's errors and the framework's as problems (RFC 9457)."""
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(TPOError, _library_error)
    app.add_exception_handler(HTTPException, _http)


def error_response(scope: Scope, error: TPOError) -> JSONResponse:
    """Return the answer to one of the library's errors, by its class attributes."""
    request_id = scope["state"]["request_id"]
    if error.status == 500:
        log_unexpected(error, request_id)
        return problem(scope, 500)
    detail, headers = str(error), None
    if error.status == 503:
        logger.warning("request %s: %s", request_id, error)
        detail = f"{error} Nothing was changed."
    if isinstance(error, QuotaExceededError):
        headers = {
            "retry-after": str(max(1, math.ceil(error.retry_after))),
            **rate_limit_headers(error.limit, error.remaining, error.reset),
        }
    return problem(scope, error.status, detail=detail, code=error.code, param=error.param, headers=headers)


def rate_limit_headers(limit: int, remaining: int, reset: float) -> dict[str, str]:
    """How much more may be asked for, in the words of OpenAI's API."""
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
        "x-ratelimit-reset-requests": f"{reset:.3f}s",
    }


def log_unexpected(error: BaseException, request_id: str) -> None:
    """Write down where an error came from, without what it says: a message may quote texts."""
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
    detail = None if error.status_code in _DETAILS else error.detail
    headers = {"allow": _methods(request)} if error.status_code == 405 else error.headers
    return problem(request.scope, error.status_code, detail=detail, headers=headers)


def _methods(request: Request) -> str:
    """What an address knows. The framework tells the methods of one of its routes alone."""
    asked = ({**request.scope, "method": method} for method in HTTPMethod)
    routes = request.app.routes
    return ", ".join(scope["method"] for scope in asked if any(r.matches(scope)[0] is Match.FULL for r in routes))


def _clean(text: str) -> str:
    """What can be sent as UTF-8, and not longer than anybody reads."""
    return text[:_SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
