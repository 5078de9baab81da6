"""Schemas of jobs and their candidates, iterations and events."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.paging import Page
from tpo.core.state import MAX_ITERATIONS, CallKind, Message, Params, RewardPart, StopReason, Unusable
from tpo.core.status import Status
from tpo.jobs.tables import IncompleteReason
from tpo.wire import Identified, Wire

JOB_ID = r"^job_[0-9a-f]{32}$"


def _is_none(value: object) -> bool:
    return value is None


class JobParameters(Params):
    """Parameters of a job, with all defaults filled in."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    reward_model: str
    prompt_set: str
    prompt_set_version: int


class Progress(Wire):
    """Progress of a job."""

    iteration: int
    max_iterations: int
    phase: str | None = Field(
        description="sampling, scoring, critique, gradient or update; null unless the job is running"
    )


class Best(Wire):
    """The best candidate so far."""

    iteration: int
    candidate_id: str
    reward: float


class JobFailure(Wire):
    """Reason for the failure of a job."""

    code: str
    message: str
    param: str | None = None


class Incomplete(Wire):
    """Reason why a job stopped early and returned its best candidate: an exhausted budget or the deadline."""

    reason: IncompleteReason


class Usage(Wire):
    """Tokens and seconds used. `total_tokens` is the policy's input and output, without `reward_tokens`."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    reward_tokens: int
    model_seconds: float = Field(
        description="wall time of the model calls in seconds, including the wait for a free slot"
    )


class JobFields(Identified):
    """Fields that a job and its summary have in common. Times are Unix timestamps in seconds."""

    object: Literal["job"] = "job"
    status: Status
    model: str
    parameters: JobParameters
    priority: int
    metadata: dict[str, str]
    external_id: str | None
    source_id: str | None = Field(description="id of the job from which this one was retried or extended")
    created_at: int
    started_at: int | None
    completed_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    next_attempt_at: int | None
    deadline_at: int | None
    estimated_finish: int | None = Field(
        description="estimate from the model calls so far; null unless the job is running"
    )
    expires_at: int | None = Field(description="deletion time of an ended job; null if it is kept")
    attempt: int
    max_attempts: int
    progress: Progress
    best: Best | None
    declined_iteration: int | None = Field(
        description="last iteration whose mean reward is below that of the iteration before; null if there is none"
    )
    error: JobFailure | None
    incomplete_details: Incomplete | None
    stop_reason: StopReason | None = Field(
        description="rule in the parameters that ended a completed job before `max_iterations`"
    )
    usage: Usage


class Job(JobFields):
    """An optimization job. Times are Unix timestamps in seconds."""

    input: str | list[Message] = Field(description="messages; a string if there is only one user message")
    output: str | None


class JobSummary(JobFields):
    """A job in a list. Texts are present only if `include` asks for them."""

    input_preview: str = Field(description="the first 200 characters of the last message")
    input: str | list[Message] | None = Field(None, exclude_if=_is_none, description="with `include=input`")
    output: str | None = Field(
        None, exclude_if=_is_none, description="with `include=output`; absent while there is none"
    )


class Deleted(Wire):
    """A job that was deleted with all its texts."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


class Extend(Wire):
    """Request to extend a job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"iterations": 2}]})

    iterations: int = Field(ge=1, le=MAX_ITERATIONS, description="iterations to add to those of the old job")


class JobPage(Page[JobSummary]):
    """A page of jobs. Request the next page with `after` set to `last_id`."""


class Candidate(Wire):
    """A sample in the pool. If `unusable` gives a reason, `text` is the raw sample."""

    id: str
    object: Literal["candidate"] = "candidate"
    iteration: int
    sample: int
    text: str
    reward: float | None
    parts: tuple[RewardPart, ...] = Field(
        description="parts whose weighted sum is the reward; empty for a single reward model that read the whole text"
    )
    unusable: Unusable | None
    tokens: int


class CandidateText(Wire):
    """A candidate of the pool at the start of an iteration, with its text."""

    id: str
    text: str
    reward: float | None


class CandidateSummary(Wire):
    """A candidate without its text."""

    id: str
    reward: float | None
    unusable: Unusable | None


class Call(Wire):
    """A model call. `seconds` is its wall time in the back end, including the wait for a free slot."""

    kind: CallKind
    n: int
    input_tokens: int
    output_tokens: int
    seconds: float


NoCandidate = Literal["blank_critique", "blank_gradient", "no_usable_sample"]


class Iteration(Wire):
    """An iteration: 0 is the initial sampling; each later one compares, criticises and revises."""

    object: Literal["iteration"] = "iteration"
    number: int
    complete: bool
    phase: str | None = Field(description="current or next phase; null if the iteration or the job has ended")
    chosen: CandidateText | None = Field(description="best candidate of the pool when the iteration began")
    rejected: CandidateText | None = Field(
        description="worst candidate of the pool when the iteration began; null in mode revision"
    )
    critique: str | None = Field(description="critique: strengths of chosen and weaknesses of rejected")
    gradient: str | None = Field(description="textual gradient: instructions derived from the critique")
    candidates: list[CandidateSummary]
    mean_reward: float | None = Field(description="mean reward of the iteration's own candidates")
    best_reward: float | None = Field(description="best reward of the pool up to and including this iteration")
    reason: NoCandidate | None = Field(description="reason why a complete iteration produced no candidate")
    declined: bool = Field(description="true if its mean reward is below that of the iteration before")
    usage: Usage
    calls: list[Call]


class Event(BaseModel):
    """An event of a job. Further fields depend on its type."""

    model_config = ConfigDict(frozen=True, extra="allow")

    object: Literal["event"] = "event"
    type: str
    sequence_number: int
    job_id: str
    created_at: int


class EventList(Wire):
    """Events of a job. While `has_more` is true, request more with `starting_after` set to the last number."""

    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool


class CandidateList(Wire):
    """Candidates of a job in sampling order. While `has_more`, request the next ones `after` the last id."""

    object: Literal["list"] = "list"
    data: list[Candidate]
    has_more: bool


class IterationList(Wire):
    """Iterations of a job that have started. While `has_more`, request the next ones `after` the last number."""

    object: Literal["list"] = "list"
    data: list[Iteration]
    has_more: bool
