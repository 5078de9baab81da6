"""What may stand after the question mark."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.jobs import JOB_ID
from tpo.core.status import Status


class JobQuery(BaseModel):
    """Which jobs a list holds. More names come through for `metadata[KEY]`; the route refuses all others."""

    model_config = ConfigDict(frozen=True, extra="allow")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, pattern=JOB_ID, description="the `last_id` of the page before")
    order: Literal["asc", "desc"] = Field("desc", description="by age; desc: the newest first")
    include: str | None = Field(
        None,
        pattern=r"^(input|output)(,(input|output))?$",
        description="texts that the list holds in addition: input, output or both, as in input,output",
    )
    status: list[Status] = Field(default_factory=list, fail_fast=True, description="may be given more than once")


MAX_WAIT_SECONDS = 60


class WaitQuery(BaseModel):
    """How long to wait for news."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wait: float = Field(
        0,
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="answer when the job has ended, or, with If-None-Match, when it has changed; after so many seconds "
        "in any case",
    )


class CandidateQuery(BaseModel):
    """Where a list of candidates starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = Field(
        None, pattern=r"^[0-9]{1,4}-[0-9]{1,4}$", description="id of the last candidate that was seen"
    )


class IterationQuery(BaseModel):
    """Where a list of iterations starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: int = Field(-1, ge=-1, le=10_000, description="number of the last iteration that was seen")


class EventQuery(BaseModel):
    """Which events, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    starting_after: int = Field(0, ge=0, le=2**31 - 1, description="the number of the last event that was seen")
    limit: int = Field(100, ge=1, le=1000, description="of a list")
    stream: bool | None = Field(None, description="true: as Server-Sent Events; default: as the Accept header says")
