"""Batches in the shapes of OpenAI's API."""

from typing import Any, Literal

from pydantic import Field

from tpo.batches import tables
from tpo.batches.tables import BatchStatus
from tpo.jobs.submission import Metadata
from tpo.openai.batch_lines import Endpoint
from tpo.openai.files import ExpiresAfter
from tpo.openai.views import CachedTokens, ReasoningTokens
from tpo.wire import Identified, Wire

WINDOW = r"^[1-9][0-9]{0,3}[smhd]$"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class BatchDeleted(Wire):
    """A deleted batch. Its output file and its error file are deleted too."""

    id: str
    object: Literal["batch"] = "batch"
    deleted: Literal[True] = True


class BatchRequest(Wire):
    """The body of `POST /v1/batches`."""

    input_file_id: str = Field(
        pattern=r"^[!-~]{1,64}$", description="id of a file with purpose `batch`, which has a request on each line"
    )
    endpoint: Endpoint
    completion_window: str = Field(
        pattern=WINDOW, description="time that the batch has: `24h`, or another number of s, m, h or d"
    )
    metadata: Metadata | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = Field(None, description="expiry of the output file and the error file")

    @property
    def window_seconds(self) -> float:
        """The completion window in seconds."""
        return int(self.completion_window[:-1]) * _SECONDS[self.completion_window[-1]]


class RequestCounts(Wire):
    """Number of requests, by result so far."""

    total: int
    completed: int
    failed: int


class BatchError(Wire):
    """An error for which a whole batch was refused."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Wire):
    """The errors for which a batch was refused."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchUsage(Wire):
    """Tokens that the policy read and wrote, over all jobs that have ended."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class Batch(Identified):
    """A batch of requests."""

    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str]


def batch(row: tables.Batch) -> Batch:
    """Build the view of a batch. Its output and error files are shown when they are complete."""
    ended = row.status in tables.ENDED
    status: BatchStatus = "cancelling" if row.status == "finalizing" and row.cancelling_at else row.status
    errors = [BatchError(code=row.error_code, message=row.error_message or "")] if row.error_code else []
    ended_at: dict[str, Any] = {
        f"{end}_at": _seconds(row.ended_at) if row.status == end else None
        for end in ("completed", "failed", "expired", "cancelled")
    }
    return Batch(
        id=row.id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=status,
        errors=BatchErrors(data=errors) if errors else None,
        output_file_id=row.output_file_id if ended else None,
        error_file_id=row.error_file_id if ended else None,
        created_at=int(row.created_at),
        in_progress_at=_seconds(row.in_progress_at),
        expires_at=int(row.expires_at),
        finalizing_at=_seconds(row.finalizing_at),
        cancelling_at=_seconds(row.cancelling_at),
        request_counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=BatchUsage(
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            total_tokens=row.input_tokens + row.output_tokens,
        ),
        metadata=row.batch_metadata,
        **ended_at,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
