"""JSON bodies of requests: read within a limit, counted, parsed and validated, and large ones off the event loop.

The framework's own body parameters are not used, because they parse and validate every body on the event loop, and
collect an error for every value.
"""

import json
from email.message import Message
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.errors import BODY_TOO_LARGE, DETAILS, JSON_REQUIRED
from api.schemas.jobs import Extend
from api.schemas.webhooks import Rotate, WebhookRequest, WebhookUpdate
from tpo import validation_messages
from tpo.core.errors import InvalidInputError
from tpo.jobs.submission import Submit
from tpo.json_limits import InvalidJSONError, check_structure
from tpo.openai.batches import BatchRequest
from tpo.openai.requests import ChatRequest, ResponseRequest
from tpo.wire import Wire

INLINE_BYTES = 64 * 1024
"""Largest body that is parsed and validated on the event loop. A larger one is worth a trip to a thread."""

SMALL_BODY_BYTES = 64 * 1024
"""Largest body of an action or a webhook, which contain no texts."""

_BATCH_BYTES = 128 * 1024
"""Largest body of a batch: full metadata, with every character escaped, fits."""

CLOSE = {"connection": "close"}
"""Header of the response to a body that is not read to its end: the connection cannot be used again."""


class JSONBody:
    """Dependency that reads a request's body as one model.

    `max_bytes` limits the body of this route further than the server's limit; `optional` accepts none.
    """

    def __init__(self, model: type[Wire], *, max_bytes: int | None = None, optional: bool = False) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._optional = optional

    async def __call__(self, request: Request) -> Any:
        """Read, parse and validate a body. Raises InvalidInputError, InvalidJSONError and HTTPException."""
        content = await self._read(request)
        if content and not _is_json(request.headers.get("content-type", "")):
            raise HTTPException(415, JSON_REQUIRED)
        return await run_in_threadpool(self.parse, content) if len(content) > INLINE_BYTES else self.parse(content)

    def parse(self, content: bytes) -> Wire | None:
        """Parse and validate a body. Raises InvalidInputError and InvalidJSONError."""
        if not content and self._optional:
            return None
        check_structure(content)
        try:
            body = json.loads(content.decode("utf-8-sig") or "null")
        except json.JSONDecodeError as error:
            message = f"The body is not valid JSON: {error.msg} (character {error.pos})."
            raise InvalidJSONError(message) from None
        except (ValueError, RecursionError):
            raise InvalidJSONError(DETAILS[400]) from None
        if body is None and self._optional:
            return None
        if not isinstance(body, dict):
            raise InvalidInputError("The body must be a JSON object.")
        try:
            return self._model.model_validate(body)
        except ValidationError as error:
            raise validation_messages.invalid(error) from None

    async def _read(self, request: Request) -> bytes:
        received = bytearray()
        try:
            async for chunk in request.stream():
                received += chunk
                if self._max_bytes is not None and len(received) > self._max_bytes:
                    raise HTTPException(413, BODY_TOO_LARGE.format(self._max_bytes), headers=CLOSE)
        except ClientDisconnect:
            raise HTTPException(400) from None  # nobody receives the response
        return bytes(received)


def _is_json(content_type: str) -> bool:
    header = Message()
    header["content-type"] = content_type
    if not content_type or header.get_content_maintype() != "application":
        return False
    subtype = header.get_content_subtype()
    return subtype == "json" or subtype.endswith("+json")


SubmitBody = Annotated[Submit, Depends(JSONBody(Submit))]
ExtendBody = Annotated[Extend, Depends(JSONBody(Extend, max_bytes=SMALL_BODY_BYTES))]
ResponseBody = Annotated[ResponseRequest, Depends(JSONBody(ResponseRequest))]
ChatBody = Annotated[ChatRequest, Depends(JSONBody(ChatRequest))]
BatchBody = Annotated[BatchRequest, Depends(JSONBody(BatchRequest, max_bytes=_BATCH_BYTES))]
WebhookBody = Annotated[WebhookRequest, Depends(JSONBody(WebhookRequest, max_bytes=SMALL_BODY_BYTES))]
WebhookUpdateBody = Annotated[WebhookUpdate, Depends(JSONBody(WebhookUpdate, max_bytes=SMALL_BODY_BYTES))]
RotateBody = Annotated[Rotate | None, Depends(JSONBody(Rotate, max_bytes=SMALL_BODY_BYTES, optional=True))]

DOCUMENTED: dict[str, tuple[type[Wire], bool]] = {
    "create_job": (Submit, True),
    "extend_job": (Extend, True),
    "create_response": (ResponseRequest, True),
    "create_chat_completion": (ChatRequest, True),
    "create_batch": (BatchRequest, True),
    "create_webhook": (WebhookRequest, True),
    "update_webhook": (WebhookUpdate, True),
    "rotate_webhook_secret": (Rotate, False),
}
"""The model of each operation's body, by the operation's id, and whether it is required."""
