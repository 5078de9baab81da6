"""Outermost ASGI middleware: request id, authentication, body limit, access log.

It is plain ASGI so that it can refuse a body while it is received, and respond whatever fails in the application.
"""

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Authenticator
from api.errors import BODY_TOO_LARGE, SERVER_STOPPING, error_response, log_unexpected, problem
from tpo.core.errors import KeyExpiredError, StoreUnavailableError
from tpo.settings import Settings

access_log = logging.getLogger("api.access")

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROTECTED = ("/v1/", "/metrics")
"""Prefixes of the paths that require a key."""
_UPLOADS = "/v1/files"
_FORM_BYTES = 64 * 1024
"""Maximum size of an upload form without its file."""
_CLOSE = {"connection": "close"}
"""The connection is closed after a refused body, because the rest of the body is not read."""


class RequestMiddleware:
    """Outermost middleware of the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._authenticator = Authenticator(settings)
        self._max_body_bytes = settings.max_body_bytes
        self._max_upload_bytes = settings.max_file_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._respond(scope, headers, receive, send_with_id)
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

    async def _respond(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(PROTECTED):
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
        most = self._max_upload_bytes if scope["path"] == _UPLOADS else self._max_body_bytes
        too_large = BODY_TOO_LARGE.format(most)
        if (length := headers.get("content-length", "")).isdecimal() and int(length) > most:
            await problem(scope, 413, detail=too_large, headers=_CLOSE)(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, too_large, headers=_CLOSE)
            return message

        before = {*scope, "route"}
        await self._app(scope, receive_within_limit, send)
        if stream := scope["state"].pop("streams_after_route", None):
            for key in scope.keys() - before:
                del scope[key]
            await stream(scope, receive_within_limit, send)


def _unauthorized(scope: Scope, detail: str | None = None) -> JSONResponse:
    """Build the response to a request without a valid key."""
    return problem(scope, 401, detail=detail, headers={"www-authenticate": "Bearer", **_CLOSE})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _VALID_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
