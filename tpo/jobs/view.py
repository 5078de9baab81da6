"""The view of a job that the store returns to its readers: a value, independent of sessions and tables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError

from tpo.core.state import Message, Params, StopReason
from tpo.core.status import Status
from tpo.jobs.tables import IncompleteReason, Job

Value = TypeVar("Value", bound=BaseModel)

_DERIVED = ("input", "params", "prompt_set", "prompt_set_version", "metadata")


@dataclass(frozen=True, slots=True)
class JobView:
    """A job at one moment. Times are Unix seconds by the database's clock."""

    id: str
    tenant: str
    external_id: str | None
    source_id: str | None
    status: Status
    model: str
    reward_model: str
    input: tuple[Message, ...]
    """Empty in a list without texts."""
    input_preview: str
    params: Params
    prompt_set: str
    prompt_set_version: int
    priority: int
    metadata: dict[str, str]

    created_at: float
    started_at: float | None
    completed_at: float | None
    cancel_requested_at: float | None
    pause_requested_at: float | None
    progressed_at: float | None
    deadline_at: float | None
    next_attempt_at: float | None
    queued_at: float

    attempt: int
    max_attempts: int
    consecutive_failures: int
    lease_owner: str | None
    lease_until: float | None
    fence: int
    iteration: int
    phase: str | None
    best_candidate: str | None
    best_reward: float | None
    declined_iteration: int | None
    input_tokens: int
    output_tokens: int
    reward_tokens: int
    model_seconds: float
    last_event: int

    output: str | None
    error_code: str | None
    error_message: str | None
    incomplete_reason: IncompleteReason | None
    stop_reason: StopReason | None

    @classmethod
    def of(cls, row: Job) -> Self:
        """Return the view of a row of the table."""
        return cls(
            input=read_messages(row.input or ()),
            params=_read(Params, row.params),
            prompt_set=row.prompts.get("name", ""),
            prompt_set_version=row.prompts.get("version", 0),
            metadata=row.job_metadata,
            **{name: getattr(row, name) for name in _COLUMNS},
        )


def read_messages(stored: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Return the messages of a stored input."""
    return tuple(_read(Message, message, role="user", content="") for message in stored)


def _read(kind: type[Value], stored: Mapping[str, Any], **fallback: str) -> Value:
    """Return a stored value. A field that another version has written in its own way has its fallback or default."""
    try:
        return kind.model_validate(stored)
    except ValidationError as error:
        unreadable = {details["loc"][0] for details in error.errors()}
        return kind.model_validate(fallback | {name: value for name, value in stored.items() if name not in unreadable})


_COLUMNS = tuple(field.name for field in fields(JobView) if field.name not in _DERIVED)
