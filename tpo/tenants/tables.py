"""Tables of tenants: limits, API keys and idempotency keys."""

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from tpo.db import Base


class Tenant(Base):
    """An owner of jobs and keys, with limits that override the settings'."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[float]
    max_jobs_in_flight: Mapped[int | None]
    max_jobs_per_minute: Mapped[int | None]
    max_jobs_running: Mapped[int | None]
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)


class ApiKey(Base):
    """An API key by its hash: the key itself is shown only when it is created."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("api_keys_by_hash", "hash", unique=True), Index("api_keys_by_tenant", "tenant"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """None: the key never expires."""
    revoked_at: Mapped[float | None]


class IdempotencyKey(Base):
    """An idempotency key, and the resource that its request created."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index("idempotency_keys_by_age", "created_at"),
        Index("idempotency_keys_by_job", "job_id"),
        Index("idempotency_keys_by_file", "file_id"),
        Index("idempotency_keys_by_batch", "batch_id"),
    )

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"))
    file_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("files.id", ondelete="CASCADE"))
    batch_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("batches.id", ondelete="CASCADE"))
    created_at: Mapped[float]
