"""Tables of files and batches."""

from typing import Any, Literal

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, String, text
from sqlalchemy.orm import Mapped, mapped_column

from tpo.db import Base

Purpose = Literal["batch", "batch_output"]
BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "cancelled", "expired"
]
ENDED: tuple[BatchStatus, ...] = ("completed", "failed", "cancelled", "expired")


class File(Base):
    """A file that was uploaded, or written by a batch. Its content is in parts."""

    __tablename__ = "files"
    __table_args__ = (
        Index("files_by_tenant", "tenant", "id"),
        Index("files_by_end", "expires_at"),
        Index("files_by_age", "created_at"),
        Index(
            "files_incomplete",
            "created_at",
            sqlite_where=text("complete IS 0"),
            postgresql_where=text("complete IS false"),
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[Purpose] = mapped_column(String(16))
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    complete: Mapped[bool] = mapped_column(default=False)
    """False while it is written: it is hidden until then."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """When it is deleted, if its owner set a time."""


class FilePart(Base):
    """Bytes of a file, from offset `start`."""

    __tablename__ = "file_parts"

    file_id: Mapped[str] = mapped_column(String(40), ForeignKey("files.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Batch(Base):
    """A batch: how far its requests are read, their results, and how far those are written."""

    __tablename__ = "batches"
    __table_args__ = (
        Index("batches_by_tenant", "tenant", "id"),
        Index("batches_by_status", "status", "advanced_at"),
        Index("batches_by_end", "ended_at"),
        Index("batches_by_input_file", "input_file_id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    status: Mapped[BatchStatus] = mapped_column(String(16), default="validating")
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file_id: Mapped[str] = mapped_column(String(40))
    output_file_id: Mapped[str | None] = mapped_column(String(40))
    error_file_id: Mapped[str | None] = mapped_column(String(40))
    completion_window: Mapped[str] = mapped_column(String(16))
    output_seconds: Mapped[float | None]
    """How long its output and error files are kept; None if its owner set no time."""
    batch_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]

    created_at: Mapped[float]
    expires_at: Mapped[float]
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    advanced_at: Mapped[float]
    """When the last step was taken. Batches that are not advanced for a while are notified again."""

    step: Mapped[int] = mapped_column(default=0)
    """Number of steps. A step is written only if no other one came first."""
    offset: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes of the input that have been read, up to the end of a line."""
    line: Mapped[int] = mapped_column(default=0)
    """Lines that have been read, blank ones included."""
    written: Mapped[int] = mapped_column(default=0)
    """The last line whose result has been written."""

    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    input_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    output_tokens: Mapped[int] = mapped_column(BigInteger, default=0)


class BatchLine(Base):
    """One request of a batch: its job, or why there is none."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        Index("batch_lines_by_custom_id", "batch_id", "custom_id"),
        Index("batch_lines_by_settled", "batch_id", "settled"),
    )

    batch_id: Mapped[str] = mapped_column(String(40), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    custom_id: Mapped[str | None]
    job_id: Mapped[str | None] = mapped_column(String(40))
    settled: Mapped[bool] = mapped_column(default=False)
    """True once it counts as completed or failed."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
