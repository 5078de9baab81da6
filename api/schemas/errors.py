"""Schemas of errors (RFC 9457, with OpenAI's `error` object)."""

from pydantic import Field

from api.schemas.server import Checks
from tpo.wire import Wire


class ErrorBody(Wire):
    """An error in the format of OpenAI's API."""

    message: str
    type: str
    code: str
    param: str | None


class Problem(Wire):
    """Problem details (RFC 9457), with the `error` object of OpenAI's API."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: ErrorBody
    checks: Checks | None = Field(None, description="only in responses of /readyz")
