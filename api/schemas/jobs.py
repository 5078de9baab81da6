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
    """Parameters of a job, with every default filled in."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    reward_model: str
    prompt_set: str
    prompt_set_version: int


class Progress(Wire):
    """Where a job stands."""

    iteration: int
    max_iterations: int
    phase: str | None = Field(description="sampling, scoring, critique, gradient or update; null before and after")


class Best(Wire):
    """The best candidate so far."""

    iteration: int
    candidate_id: str
    reward: float


class JobFailure(Wire):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Incomplete(Wire):
    """Why a job was cut short with the best it had: a budget by its parameter's name, or its deadline."""

    reason: IncompleteReason


class Usage(Wire):
    """Tokens and seconds: `total_tokens` is what the policy read and wrote; the reward model's stand apart."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    reward_tokens: int
    model_seconds: float = Field(
        description="wall time inside its model calls on whatever device, waiting for a place among others included"
    )


class JobFields(Identified):
    """What a job and its place in a list have in common. Times are Unix seconds."""

    object: Literal["job"] = "job"
    status: Status
    model: str
    parameters: JobParameters
    priority: int
    metadata: dict[str, str]
    external_id: str | None
    source_id: str | None = Field(description="the job from whose record this one started")
    created_at: int
    started_at: int | None
    completed_at: int | None
    cancel_requested_at: int | None
    pause_requested_at: int | None
    next_attempt_at: int | None
    deadline_at: int | None
    estimated_finish: int | None = Field(description="while it runs, by its calls so far; a guess")
    expires_at: int | None = Field(description="when an ended job is deleted; null where it is kept")
    attempt: int
    max_attempts: int
    progress: Progress
    best: Best | None
    declined_iteration: int | None = Field(
        description="the last iteration whose mean reward fell below that of the one before; null where none did"
    )
    error: JobFailure | None
    incomplete_details: Incomplete | None
    stop_reason: StopReason | None = Field(
        description="why a completed job made fewer iterations than `max_iterations`, by a rule of its parameters"
    )
    usage: Usage


class Job(JobFields):
    """One optimization. Times are Unix seconds."""

    input: str | list[Message] = Field(description="a single user's turn is given as a string")
    output: str | None


class JobSummary(JobFields):
    """A job in a list. Texts are present only if `include` asks for them."""

    input_preview: str = Field(description="the first 200 characters of the last message")
    input: str | list[Message] | None = Field(None, exclude_if=_is_none, description="with `include=input`")
    output: str | None = Field(
        None, exclude_if=_is_none, description="with `include=output`; absent while there is none"
    )


class Deleted(Wire):
    """A job that was forgotten, with all its texts."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


class Extend(Wire):
    """How much further a job goes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"iterations": 2}]})

    iterations: int = Field(ge=1, le=MAX_ITERATIONS, description="rounds of critique to add to those of the old job")


class JobPage(Page[JobSummary]):
    """A page of jobs; the next one starts `after` its `last_id`."""


class Candidate(Wire):
    """One sampled response. Where `unusable` says why it is none, `text` is the raw reply."""

    id: str
    object: Literal["candidate"] = "candidate"
    iteration: int
    sample: int
    text: str
    reward: float | None
    parts: tuple[RewardPart, ...] = Field(
        description="what the reward is the weighted sum of; empty where one model gave it and read them whole"
    )
    unusable: Unusable | None
    tokens: int


class CandidateText(Wire):
    """A candidate as the critic saw it."""

    id: str
    text: str
    reward: float | None


class CandidateSummary(Wire):
    """A candidate without its text."""

    id: str
    reward: float | None
    unusable: Unusable | None


class Call(Wire):
    """One model call and the seconds that it took inside the back end, waiting included."""

    kind: CallKind
    n: int
    input_tokens: int
    output_tokens: int
    seconds: float


NoCandidate = Literal["blank_textual_loss", "blank_textual_gradient", "no_usable_sample"]


class Iteration(Wire):
    """One round: 0 is the first sampling; each later one compares, criticises and revises."""

    object: Literal["iteration"] = "iteration"
    number: int
    complete: bool
    phase: str | None = Field(description="what runs now, or comes next; null where nothing does")
    chosen: CandidateText | None = Field(description="the best of the pool when the iteration began")
    rejected: CandidateText | None = Field(description="the worst of the pool then; null in mode revision")
    critique: str | None = Field(description="the critique: strengths and weaknesses of chosen")
    gradient: str | None = Field(description="the instructions that were made of the critique")
    candidates: list[CandidateSummary]
    mean_reward: float | None = Field(description="of this iteration's own candidates")
    best_reward: float | None = Field(description="of the pool up to and with this iteration")
    reason: NoCandidate | None = Field(description="why a complete iteration gave no candidate")
    declined: bool = Field(description="its mean reward fell below that of the one before")
    usage: Usage
    calls: list[Call]


class Event(BaseModel):
    """One thing that happened to a job; what else stands in it depends on its type."""

    model_config = ConfigDict(frozen=True, extra="allow")

    object: Literal["event"] = "event"
    type: str
    sequence_number: int
    job_id: str
    created_at: int


class EventList(Wire):
    """Events of a job; while `has_more`, ask again `starting_after` the last number."""

    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool


class CandidateList(Wire):
    """Candidates of a job, in the order in which they were sampled; while `has_more`, ask again `after` the last id."""

    object: Literal["list"] = "list"
    data: list[Candidate]
    has_more: bool


class IterationList(Wire):
    """Iterations of a job that have begun; while `has_more`, ask again `after` the last number."""

    object: Literal["list"] = "list"
    data: list[Iteration]
    has_more: bool
