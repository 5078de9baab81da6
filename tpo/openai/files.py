"""Files in the shapes of OpenAI's API."""

from typing import Literal

from pydantic import Field

from tpo.batches import tables
from tpo.batches.tables import Purpose
from tpo.wire import Identified, Wire


class File(Identified):
    """An uploaded file, or a file that a batch wrote."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    expires_at: int | None = Field(description="when the file is deleted, in Unix seconds; null for never")


class FileDeleted(Wire):
    """A deleted file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(Wire):
    """The expiry of a file, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(
        ge=3600, le=2_592_000, description="seconds after the file's creation: from an hour to 30 days"
    )


def file(row: tables.File, retention_days: float | None) -> File:
    """Build the view of a file. It expires at its own time or after the retention, whichever is first."""
    expiries = [] if row.expires_at is None else [row.expires_at]
    if retention_days is not None:
        expiries.append(row.created_at + retention_days * 86400)
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        expires_at=int(min(expiries)) if expiries else None,
    )
