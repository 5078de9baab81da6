"""Schemas of health, models and prompt sets."""

from typing import Literal

from pydantic import Field

from tpo.wire import Wire


class Model(Wire):
    """A policy that live workers serve."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="start time of the first live worker that serves it")
    owned_by: Literal["tpo"] = "tpo"
    reward_models: list[str] = Field(description="reward models that workers serve together with it")
    workers: int


class ModelList(Wire):
    """All policies that live workers serve."""

    object: Literal["list"] = "list"
    data: list[Model]


class RewardModel(Wire):
    """A reward model that live workers serve."""

    id: str
    object: Literal["reward_model"] = "reward_model"
    created: int = Field(description="start time of the first live worker that serves it")
    models: list[str] = Field(description="policies that workers serve together with it")
    workers: int


class RewardModelList(Wire):
    """All reward models that live workers serve."""

    object: Literal["list"] = "list"
    data: list[RewardModel]


class PromptSet(Wire):
    """A set of prompts that a job can use."""

    id: str
    object: Literal["prompt_set"] = "prompt_set"
    version: int
    style: Literal["conversation", "separate"]
    default: bool


class PromptSetList(Wire):
    """All built-in prompt sets."""

    object: Literal["list"] = "list"
    data: list[PromptSet]


class Health(Wire):
    """The process is alive."""

    status: Literal["ok"] = "ok"


Check = Literal["ok", "missing", "unknown"]
QueueCheck = Literal["ok", "stalled", "unknown"]
DiskCheck = Literal["ok", "full", "unknown"]


class Checks(Wire):
    """State of the services that jobs require."""

    database: Check
    broker: Check
    worker: Check
    queue: QueueCheck = Field(description="stalled: jobs wait although workers that serve them have free slots")
    disk: DiskCheck = Field(description="the disk that holds the database")


class Ready(Wire):
    """The server is ready: jobs can run."""

    status: Literal["ready"] = "ready"
    checks: Checks


class Welcome(Wire):
    """Links to the documentation and the main routes."""

    name: str
    version: str
    docs: str
    openapi: str
    jobs: str
    ready: str
