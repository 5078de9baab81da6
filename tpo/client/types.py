"""Types of the server's responses. The values are plain JSON, so fields that a newer server adds are present too."""

from typing import Any, Literal, NotRequired, TypedDict

from tpo.core import status
from tpo.core.status import Status as Status

BODY_FIELDS = frozenset({"model", "input", "parameters", "priority", "metadata", "external_id", "deadline_seconds"})
"""Fields of a submission's body. All others are parameters."""

TERMINAL: frozenset[str] = frozenset(status.TERMINAL)
"""Statuses in which a job no longer changes."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Progress(TypedDict):
    """The current iteration and phase of a job."""

    iteration: int
    max_iterations: int
    phase: str | None


class Best(TypedDict):
    """The best candidate so far."""

    iteration: int
    candidate_id: str
    reward: float


class Failure(TypedDict):
    """The error of a failed job."""

    code: str
    message: str
    param: str | None


class Incomplete(TypedDict):
    """The reason why a job ended early, with its best answer so far."""

    reason: str


class Usage(TypedDict):
    """Tokens, and seconds of wall time inside model calls."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    reward_tokens: int
    model_seconds: float


class JobFields(TypedDict):
    """Fields that a job and its summary have in common. Times are Unix seconds."""

    id: str
    object: Literal["job"]
    status: Status
    model: str
    parameters: dict[str, Any]
    priority: int
    metadata: dict[str, str]
    external_id: str | None
    source_id: str | None
    created_at: int
    started_at: int | None
    completed_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    next_attempt_at: int | None
    deadline_at: int | None
    estimated_finish: int | None
    expires_at: int | None
    attempt: int
    max_attempts: int
    progress: Progress
    best: Best | None
    declined_iteration: int | None
    error: Failure | None
    incomplete_details: Incomplete | None
    stop_reason: str | None
    usage: Usage


class Job(JobFields):
    """One optimization. Times are Unix seconds."""

    input: str | list[Message]
    output: str | None


class JobSummary(JobFields):
    """A job in a list. Its texts are present only if the list was asked to include them."""

    input_preview: str
    input: NotRequired[str | list[Message]]
    output: NotRequired[str]


class Event(TypedDict):
    """An event of a job. Its other fields depend on its type."""

    object: Literal["event"]
    type: str
    sequence_number: int
    job_id: str
    created_at: int


class RewardPart(TypedDict):
    """One term of a reward that is a weighted sum. `value` is before weighting."""

    name: str
    value: float | None
    weight: float


class Candidate(TypedDict):
    """One sample of a job. If it is `unusable`, `text` is the whole reply of the policy."""

    id: str
    object: Literal["candidate"]
    iteration: int
    sample: int
    text: str
    reward: float | None
    parts: list[RewardPart]
    unusable: str | None
    tokens: int


class Iteration(TypedDict):
    """One iteration. Number 0 is the first sampling; each later one compares, criticises and revises."""

    object: Literal["iteration"]
    number: int
    complete: bool
    phase: str | None
    chosen: dict[str, Any] | None
    rejected: dict[str, Any] | None
    critique: str | None
    gradient: str | None
    candidates: list[dict[str, Any]]
    mean_reward: float | None
    best_reward: float | None
    reason: str | None
    declined: bool
    usage: Usage
    calls: list[dict[str, Any]]
