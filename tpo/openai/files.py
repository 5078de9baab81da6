"""Files as OpenAI's clients read them."""

from typing import Literal

from pydantic import Field

from tpo.batches import tables
from tpo.batches.tables import Purpose
from tpo.wire import Identified, Wire


class File(Identified):
    """A file."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    expires_at: int | None = Field(description="when it is deleted; null where it is kept")


class FileDeleted(Wire):
    """A file that is forgotten."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(Wire):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000, description="from an hour to 30 days after the file was made")


def file(row: tables.File, retention_days: float | None) -> File:
    """One file, as it is kept where everything goes after so many days."""
    ends = [] if row.expires_at is None else [row.expires_at]
    if retention_days is not None:
        ends.append(row.created_at + retention_days * 86400)
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        expires_at=int(min(ends)) if ends else None,
    )
