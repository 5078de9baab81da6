"""Schemas of errors (RFC 9457, with OpenAI's `error` object)."""

from pydantic import Field

from api.schemas.server import Checks
from tpo.wire import Wire


class ErrorBody(Wire):
    """The error as clients of OpenAI's API read it."""

    message: str
    type: str
    code: str
    param: str | None


class Problem(Wire):
    """An error: RFC 9457, and beside it the `error` that OpenAI's clients read."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    error: ErrorBody
    checks: Checks | None = Field(None, description="of /readyz alone")
