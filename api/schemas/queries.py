"""Schemas of query strings."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.jobs import JOB_ID
from tpo.core.status import Status


class JobQuery(BaseModel):
    """Filter, order and page of a list of jobs. Extra names are allowed for `metadata[KEY]`; the route checks them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, pattern=JOB_ID, description="`last_id` of the previous page")
    order: Literal["asc", "desc"] = Field("desc", description="order by creation time; desc: newest first")
    include: str | None = Field(
        None,
        pattern=r"^(input|output)(,(input|output))?$",
        description="texts that the list also contains: input, output or both, as in input,output",
    )
    status: list[Status] = Field(
        default_factory=list, fail_fast=True, description="only jobs with one of these statuses; repeatable"
    )


MAX_WAIT_SECONDS = 60


class WaitQuery(BaseModel):
    """Query parameters of a long poll."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wait: float = Field(
        0,
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="maximum wait in seconds for the job to end or, with If-None-Match, to change",
    )


class CandidateQuery(BaseModel):
    """Query parameters of a list of candidates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = Field(
        None, pattern=r"^[0-9]{1,4}-[0-9]{1,4}$", description="id of the last candidate that was seen"
    )


class IterationQuery(BaseModel):
    """Query parameters of a list of iterations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: int = Field(-1, ge=-1, le=10_000, description="number of the last iteration that was seen")


class EventQuery(BaseModel):
    """Query parameters of a list or stream of events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    starting_after: int = Field(0, ge=0, le=2**31 - 1, description="number of the last event received")
    limit: int = Field(100, ge=1, le=1000, description="maximum number of events in a list")
    stream: bool | None = Field(None, description="true: Server-Sent Events; default: decided by the Accept header")
