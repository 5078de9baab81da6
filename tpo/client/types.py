"""What the server answers, as types. The values are the plain JSON: a field that a newer server adds is there too."""

from typing import Any, Literal, TypedDict

from tpo.core import status
from tpo.core.status import Status as Status

TERMINAL: frozenset[str] = frozenset(status.TERMINAL)
"""A job in one of these never changes again."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Progress(TypedDict):
    """Where a job stands."""

    iteration: int
    max_iterations: int
    phase: str | None


class Best(TypedDict):
    """The best candidate so far."""

    iteration: int
    candidate_id: str
    reward: float


class Failure(TypedDict):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Incomplete(TypedDict):
    """Why a job was cut short with the best it had."""

    reason: str


class Usage(TypedDict):
    """Tokens, and seconds inside model calls, whatever the models run on."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    reward_tokens: int
    model_seconds: float


class Job(TypedDict):
    """One optimization. Times are unix seconds."""

    id: str
    object: Literal["job"]
    status: Status
    model: str
    input: str | list[Message]
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
    output: str | None
    error: Failure | None
    incomplete_details: Incomplete | None
    stop_reason: str | None
    usage: Usage


class Event(TypedDict):
    """One thing that happened to a job; what else stands in it depends on its type."""

    object: Literal["event"]
    type: str
    sequence_number: int
    job_id: str
    created_at: int


class RewardPart(TypedDict):
    """One of the things that a reward is the weighted sum of; `value` is before its weight."""

    name: str
    value: float | None
    weight: float


class Candidate(TypedDict):
    """One sampled response. Where `unusable` says why it is none, `text` is the raw reply."""

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
    """One round: 0 is the first sampling; each later one compares, criticises and revises."""

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
