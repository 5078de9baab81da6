"""What every request passes before any route: its id, the key, the size of its body, one line in the log.

Plain ASGI, because a body must be refused while it streams in, and an answer must come whatever fails behind.
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
from api.errors import error_response, log_unexpected, problem
from tpo.core.errors import InvalidInputError, StoreUnavailableError
from tpo.origins import is_foreign, is_host_allowed
from tpo.settings import Settings

access_log = logging.getLogger("api.access")

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROTECTED = ("/v1/", "/metrics")
"""Addresses that ask for a key, by how they begin."""
_MAX_QUERY_PARAMETERS = 100
_ANY_HOST = ("/healthz", "/readyz")
"""Addresses that answer whatever the Host header says."""
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
"""What a form holds beside the file."""


class RequestMiddleware:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._with_cors: ASGIApp = self._answer
        if settings.allowed_origins:
            # Before the key is checked: a browser sends no key with a preflight request.
            self._with_cors = CORSMiddleware(
                self._answer,
                allow_origins=settings.allowed_origins,
                allow_methods=_METHODS,
                allow_headers=["*"],
                expose_headers=_EXPOSED_HEADERS,
            )
        self._doorkeeper = Authenticator(settings)
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
            # The time that SIGTERM leaves to requests is over. This is the task's end, so the cancel goes no further.
            detail = "The server stops. Look whether this took effect before you send it again."
            if not status:
                await problem(scope, 503, detail=detail, code="server_stopping")(scope, receive, send_with_id)
        except Exception as error:
            # Not raised again: the server would log what the error says, and that may quote a user's text.
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
            detail = "This server does not answer to that Host header; TPO_ALLOWED_HOSTS lists the names that it has."
            return problem(scope, 421, detail=detail, code="host_not_allowed", headers=CLOSE)
        if is_foreign(scope["method"], headers, settings.allowed_origins):
            detail = "A web page of another origin asks for a change; TPO_ALLOWED_ORIGINS lists those that may."
            return problem(scope, 403, detail=detail, code="origin_not_allowed", headers=CLOSE)
        return None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = get_route_path(scope)
        if path.startswith(PROTECTED):
            try:
                tenant = await self._doorkeeper.tenant(scope["app"].state.store, headers.get("authorization", ""))
            except StoreUnavailableError as error:
                await error_response(scope, error)(scope, receive, send)
                return
            if tenant is None:
                refusal = problem(
                    scope,
                    401,
                    detail="Send your API key with the header Authorization: Bearer KEY.",
                    headers={"www-authenticate": "Bearer", **CLOSE},
                )
                await refusal(scope, receive, send)
                return
            scope["state"]["tenant"] = tenant
        if scope["query_string"].count(b"&") >= _MAX_QUERY_PARAMETERS:
            error = InvalidInputError(f"The address has more than {_MAX_QUERY_PARAMETERS} query parameters.")
            await error_response(scope, error)(scope, receive, send)
            return
        most = self._max_upload_bytes if path == _UPLOADS else self._max_body_bytes
        too_large = f"The body is larger than {most} bytes."
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

        kept = {*scope, "route"}
        await self._app(scope, receive_within_limit, send)
        if stream := scope["state"].pop("streams_after_route", None):
            for of_the_route in scope.keys() - kept:
                del scope[of_the_route]
            await stream(scope, receive_within_limit, send)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
