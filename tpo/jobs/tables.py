"""Tables of jobs, workers and queues. Times are Unix seconds by the database's clock."""

from typing import Any, Literal

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from tpo.core.state import Budget, StopReason
from tpo.core.status import LIVE, TERMINAL, Status
from tpo.db import DEFAULT_TENANT, Base, now
from tpo.db.base import partial_index

_STATUSES = (*LIVE, *TERMINAL)


PREVIEW_CHARACTERS = 200

IncompleteReason = Literal[Budget, "deadline"]


class Job(Base):
    """One optimization: its request, its lease, its progress and its result."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ({})".format(", ".join(f"'{s}'" for s in _STATUSES)), name="jobs_status"),
        Index("jobs_by_tenant", "tenant", "id"),
        Index("jobs_by_tenant_and_status", "tenant", "status", "id"),
        Index("jobs_by_stored_bytes", "tenant", "input_bytes"),
        Index("jobs_by_external_id", "tenant", "external_id", unique=True),
        Index("jobs_by_end", "completed_at"),
        Index("jobs_by_status", "status", "id"),
        # The queues: waiting jobs by pair of models, tenant and priority, the oldest first.
        partial_index(
            *("jobs_in_line", "model", "reward_model", "tenant", "priority", "id"),
            where="status = 'queued' AND next_attempt_at IS NULL AND quarantine IS NULL",
        ),
        partial_index(
            "jobs_running", "model", "reward_model", "tenant", where="status IN ('in_progress', 'cancelling')"
        ),
        # It starts with the status; otherwise SQLite rates any index that starts with it equally good.
        partial_index(
            *("jobs_by_next_attempt", "status", "next_attempt_at"),
            where="status = 'queued' AND next_attempt_at IS NOT NULL",
        ),
        # Suspects of a crash, which are few: waiting ones and running ones.
        partial_index(
            *("jobs_in_quarantine", "model", "reward_model", "queued_at", "id"), where="quarantine IS NOT NULL"
        ),
        # Partial, because most jobs have no deadline, and every job changes its status several times.
        partial_index("jobs_by_deadline", "status", "deadline_at", where="deadline_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), default=DEFAULT_TENANT)
    external_id: Mapped[str | None] = mapped_column(String(512))
    """The client's own name for the job, unique within its tenant."""
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """A hash of the body that created the job; it distinguishes a repeated request from a different one."""
    source_id: Mapped[str | None] = mapped_column(String(40))
    """The job whose pool this one started from."""
    status: Mapped[Status] = mapped_column(String(16), default="queued")
    model: Mapped[str]
    reward_model: Mapped[str]
    input: Mapped[list[Any]]
    input_preview: Mapped[str] = mapped_column(String(PREVIEW_CHARACTERS))
    """The beginning of the last message, for lists."""
    input_bytes: Mapped[int]
    """The length of all messages in UTF-8."""
    params: Mapped[dict[str, Any]]
    prompts: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0)
    """From -100 to 100; a higher one goes first."""
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)

    created_at: Mapped[float]
    started_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    progressed_at: Mapped[float | None]
    deadline_at: Mapped[float | None]
    next_attempt_at: Mapped[float | None]
    """If set, the job is not in the queue until the rescuer returns it at that time."""

    attempt: Mapped[int] = mapped_column(default=0)
    consecutive_failures: Mapped[int] = mapped_column(default=0)
    """Attempts since the last recorded step. They count against `max_attempts`."""
    max_attempts: Mapped[int]
    fence: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    lost_together: Mapped[bool] = mapped_column(default=False)
    """True once another job of the same worker was lost: if this one is lost too, it was not alone."""
    quarantine: Mapped[str | None] = mapped_column(String(16))
    """The quarantine group of a job that is suspected of having killed its worker."""
    lost_with: Mapped[str | None]
    """The worker that the job was last lost with. If that worker lives on, the job is no suspect."""
    queued_at: Mapped[float]
    """When the job last entered the queue, or its workers were last notified."""

    iteration: Mapped[int] = mapped_column(default=0)
    phase: Mapped[str | None]
    best_candidate: Mapped[str | None]
    best_reward: Mapped[float | None]
    declined_iteration: Mapped[int | None]
    """The last iteration whose mean reward fell below that of the one before."""
    input_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)
    reward_tokens: Mapped[int] = mapped_column(default=0)
    model_seconds: Mapped[float] = mapped_column(default=0.0)
    """Seconds inside model calls so far, queueing in the back end included."""
    last_event: Mapped[int] = mapped_column(default=0)

    output: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    incomplete_reason: Mapped[IncompleteReason | None] = mapped_column(Text)
    stop_reason: Mapped[StopReason | None] = mapped_column(Text)
    """Why a completed job made fewer iterations than requested."""


class _BelongsToJob:
    """A row that belongs to a job and is deleted with it."""

    job_id: Mapped[str] = mapped_column(
        String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, sort_order=-1
    )


class MetadataRow(_BelongsToJob, Base):
    """One pair of a job's metadata, which the job's row contains as a whole. Lists filtered by a pair search here."""

    __tablename__ = "job_metadata"
    __table_args__ = (Index("job_metadata_by_pair", "tenant", "key", "value", "job_id"),)

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    tenant: Mapped[str] = mapped_column(String(64))


class IterationRow(_BelongsToJob, Base):
    """One round: the compared candidates, the critique and the gradient."""

    __tablename__ = "iterations"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    chosen: Mapped[str]
    rejected: Mapped[str | None]
    critique: Mapped[str | None]
    critique_attempt: Mapped[int] = mapped_column(default=0)
    gradient: Mapped[str | None]
    gradient_attempt: Mapped[int] = mapped_column(default=0)


class CandidateRow(_BelongsToJob, Base):
    """One sample in the pool."""

    __tablename__ = "candidates"

    iteration: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sample: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str]
    tokens: Mapped[int]
    reward: Mapped[float | None]
    unusable: Mapped[str | None]
    parts: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """The terms of the reward; null if it has only one."""


class CallRow(_BelongsToJob, Base):
    """One model call. The primary key guarantees that a step is recorded once."""

    __tablename__ = "calls"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    iteration: Mapped[int]
    n: Mapped[int]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    seconds: Mapped[float]


class EventRow(_BelongsToJob, Base):
    """One event of a job, numbered 1 to n without a gap."""

    __tablename__ = "events"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(insert_default=now())


class Worker(Base):
    """A worker process that is or recently was alive, and the models that it serves."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str]
    reward_model: Mapped[str]
    concurrency: Mapped[int]
    started_at: Mapped[float]
    seen_at: Mapped[float]


class Queue(Base):
    """The queue of one policy, if an operator has paused or resumed it."""

    __tablename__ = "queues"

    model: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[float | None]


class LastClaim(Base):
    """The last claim of a tenant at one priority, for one pair of models."""

    __tablename__ = "last_claims"

    model: Mapped[str] = mapped_column(primary_key=True)
    reward_model: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    priority: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    claimed_at: Mapped[float]
