"""Outermost ASGI middleware: request id, authentication, body limit, access log.

It is plain ASGI so that it can refuse a body while it is received, and respond whatever fails in the application.
"""

import asyncio
import logging
import re
import secrets
import time

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Authenticator
from api.bodies import CLOSE
from api.errors import (
    BODY_TOO_LARGE,
    HOST_NOT_ALLOWED,
    ORIGIN_NOT_ALLOWED,
    SERVER_STOPPING,
    error_response,
    log_unexpected,
    problem,
)
from tpo.core.errors import InvalidInputError, KeyExpiredError, StoreUnavailableError
from tpo.origins import is_foreign, is_host_allowed
from tpo.settings import Settings

access_log = logging.getLogger("api.access")

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROTECTED = ("/v1/", "/metrics")
"""Prefixes of the paths that require a key."""
_MAX_QUERY_PARAMETERS = 100
_ANY_HOST = ("/healthz", "/readyz")
"""Paths that answer to any Host header."""
_METHODS = ("GET", "POST", "PATCH", "DELETE")
_EXPOSED_HEADERS = (
    "etag",
    "idempotent-replayed",
    "location",
    "preference-applied",
    "retry-after",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-request-id",
)
"""Headers of responses that a web page of an allowed origin can read."""
_UPLOADS = "/v1/files"
_FORM_BYTES = 64 * 1024
"""Maximum size of an upload form without its file."""


class RequestMiddleware:
    """Outermost middleware of the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._with_cors: ASGIApp = self._respond
        if settings.allowed_origins:
            # Before the key is checked: a browser sends no key with a preflight request.
            self._with_cors = CORSMiddleware(
                self._respond,
                allow_origins=settings.allowed_origins,
                allow_methods=_METHODS,
                allow_headers=["*"],
                expose_headers=_EXPOSED_HEADERS,
            )
        self._authenticator = Authenticator(settings)
        self._max_body_bytes = settings.max_body_bytes
        self._max_upload_bytes = settings.max_file_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._settings.root_path or ""
        started = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                if answered.get("location", "").startswith("/"):
                    answered["location"] = scope["root_path"] + answered["location"]
            await send(message)

        try:
            refusal = self._refuse_page(scope, headers)
            await (refusal or self._with_cors)(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # The grace period after SIGTERM is over. The task ends here, so the cancellation is not raised again.
            if not status:
                await problem(scope, 503, detail=SERVER_STOPPING, code="server_stopping")(scope, receive, send_with_id)
        except Exception as error:
            # Not raised again: uvicorn would log the message, which may quote users' texts.
            log_unexpected(error, request_id)
            if not status:
                await problem(scope, 500)(scope, receive, send_with_id)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            took = time.monotonic() - started
            scope["app"].state.metrics.observe_request(scope, status, took)
            access_log.info("%s %s %d %.0fms %s", scope["method"], path, status, took * 1000, request_id)

    def _refuse_page(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """Return the refusal of a request by a foreign web page."""
        settings = self._settings
        host = headers.get("host", "")
        # Probes and load balancers ask by address, and these responses tell nothing about jobs.
        if get_route_path(scope) not in _ANY_HOST and not is_host_allowed(host, settings.host, settings.allowed_hosts):
            return problem(scope, 421, detail=HOST_NOT_ALLOWED, code="host_not_allowed", headers=CLOSE)
        if is_foreign(scope["method"], headers, settings.allowed_origins):
            return problem(scope, 403, detail=ORIGIN_NOT_ALLOWED, code="origin_not_allowed", headers=CLOSE)
        return None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = get_route_path(scope)
        if path.startswith(PROTECTED):
            try:
                tenant = await self._authenticator.tenant(scope["app"].state.store, headers.get("authorization", ""))
            except KeyExpiredError as error:
                await _unauthorized(scope, str(error))(scope, receive, send)
                return
            except StoreUnavailableError as error:
                await error_response(scope, error)(scope, receive, send)
                return
            if tenant is None:
                await _unauthorized(scope)(scope, receive, send)
                return
            scope["state"]["tenant"] = tenant
        if scope["query_string"].count(b"&") >= _MAX_QUERY_PARAMETERS:
            too_many = InvalidInputError(f"The address has more than {_MAX_QUERY_PARAMETERS} query parameters.")
            await error_response(scope, too_many)(scope, receive, send)
            return
        most = self._max_upload_bytes if path == _UPLOADS else self._max_body_bytes
        too_large = BODY_TOO_LARGE.format(most)
        if (length := headers.get("content-length", "")).isdecimal() and int(length) > most:
            await problem(scope, 413, detail=too_large, headers=CLOSE)(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, too_large, headers=CLOSE)
            return message

        before = {*scope, "route"}
        await self._app(scope, receive_within_limit, send)
        if stream := scope["state"].pop("streams_after_route", None):
            for key in scope.keys() - before:
                del scope[key]
            await stream(scope, receive_within_limit, send)


def _unauthorized(scope: Scope, detail: str | None = None) -> JSONResponse:
    """Build the response to a request without a valid key."""
    return problem(scope, 401, detail=detail, headers={"www-authenticate": "Bearer", **CLOSE})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _VALID_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
