"""The schema as typed models. Times are unix seconds by the database's clock; the migrations build it."""

from typing import Any, Literal

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from tpo.core.state import Budget, StopReason
from tpo.core.status import LIVE, TERMINAL, Status
from tpo.db import DEFAULT_TENANT, Base, now
from tpo.db.base import partial_index

_STATUSES = (*LIVE, *TERMINAL)


IncompleteReason = Literal[Budget, "deadline"]


class Job(Base):
    """One optimization: who asked for what, who holds it, where it stands, what came of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ({})".format(", ".join(f"'{s}'" for s in _STATUSES)), name="jobs_status"),
        Index("jobs_by_tenant", "tenant", "id"),
        Index("jobs_by_tenant_and_status", "tenant", "status", "id"),
        Index("jobs_by_external_id", "tenant", "external_id", unique=True),
        Index("jobs_by_end", "completed_at"),
        Index("jobs_by_status", "status", "id"),
        # A queue's line: waiting jobs by the tenant and the priority, the oldest of each first.
        partial_index(
            *("jobs_in_line", "model", "reward_model", "tenant", "priority", "id"),
            where="status = 'queued' AND next_attempt_at IS NULL",
        ),
        partial_index(
            "jobs_running", "model", "reward_model", "tenant", where="status IN ('in_progress', 'cancelling')"
        ),
        # With the status, or to SQLite any index that begins with it is as good.
        partial_index(
            *("jobs_by_next_attempt", "status", "next_attempt_at"),
            where="status = 'queued' AND next_attempt_at IS NOT NULL",
        ),
        # Most jobs have no deadline, and change their status several times.
        partial_index("jobs_by_deadline", "status", "deadline_at", where="deadline_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), default=DEFAULT_TENANT)
    external_id: Mapped[str | None] = mapped_column(String(512))
    """The client's own name for the job, unique among its tenant's."""
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """A hash of the body that made the job: what comes again is told from what is new."""
    source_id: Mapped[str | None] = mapped_column(String(40))
    """The job from whose pool this one started."""
    status: Mapped[Status] = mapped_column(String(16), default="queued")
    model: Mapped[str]
    reward_model: Mapped[str]
    input: Mapped[list[Any]]
    params: Mapped[dict[str, Any]]
    prompts: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0)
    """From -100 to 100; the higher goes first."""
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)

    created_at: Mapped[float]
    started_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    progressed_at: Mapped[float | None]
    deadline_at: Mapped[float | None]
    next_attempt_at: Mapped[float | None]
    """A queued job with this is not in line: the sweeper puts it back there when the time has come."""

    attempt: Mapped[int] = mapped_column(default=0)
    consecutive_failures: Mapped[int] = mapped_column(default=0)
    """Attempts since the last recorded step; those count against `max_attempts`."""
    max_attempts: Mapped[int]
    fence: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    queued_at: Mapped[float]
    """When the job last came into line, and workers were rung for."""

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
    """What its model calls took so far, waiting inside the back end included."""
    last_event: Mapped[int] = mapped_column(default=0)

    output: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    incomplete_reason: Mapped[IncompleteReason | None] = mapped_column(Text)
    stop_reason: Mapped[StopReason | None] = mapped_column(Text)
    """Why a completed job made fewer iterations than it was to make."""


class _OfJob:
    """A row that belongs to a job and goes with it."""

    job_id: Mapped[str] = mapped_column(
        String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, sort_order=-1
    )


class MetadataRow(_OfJob, Base):
    """One pair of a job's metadata, beside the whole in the job's row: a list by a pair finds its jobs here."""

    __tablename__ = "job_metadata"
    __table_args__ = (Index("job_metadata_by_pair", "tenant", "key", "value", "job_id"),)

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    tenant: Mapped[str] = mapped_column(String(64))


class IterationRow(_OfJob, Base):
    """One round of critique: whom it compared, and what was said."""

    __tablename__ = "iterations"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    chosen: Mapped[str]
    rejected: Mapped[str | None]
    critique: Mapped[str | None]
    critique_attempt: Mapped[int] = mapped_column(default=0)
    gradient: Mapped[str | None]
    gradient_attempt: Mapped[int] = mapped_column(default=0)


class CandidateRow(_OfJob, Base):
    """One sampled response."""

    __tablename__ = "candidates"

    iteration: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sample: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str]
    tokens: Mapped[int]
    reward: Mapped[float | None]
    unusable: Mapped[str | None]
    parts: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """What the reward is the sum of; null where it has no parts."""


class CallRow(_OfJob, Base):
    """One model call. The primary key is what makes a step's record single."""

    __tablename__ = "calls"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    iteration: Mapped[int]
    n: Mapped[int]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    seconds: Mapped[float]


class EventRow(_OfJob, Base):
    """One thing that happened to a job; numbers run 1..n without a gap."""

    __tablename__ = "events"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(insert_default=now())


class Worker(Base):
    """One worker process that is, or lately was, alive, and what it serves."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str]
    reward_model: Mapped[str]
    concurrency: Mapped[int]
    started_at: Mapped[float]
    seen_at: Mapped[float]


class Queue(Base):
    """The jobs of one policy, where an operator has said something about them."""

    __tablename__ = "queues"

    model: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[float | None]


class LastClaim(Base):
    """When a tenant last had a turn at one priority, with one pair of models."""

    __tablename__ = "last_claims"

    model: Mapped[str] = mapped_column(primary_key=True)
    reward_model: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    priority: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    claimed_at: Mapped[float]
