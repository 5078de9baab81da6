"""Schemas of health, models and prompt sets."""

from typing import Literal

from pydantic import Field

from tpo.wire import Wire


class Model(Wire):
    """A policy that live workers serve."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="since when it is served")
    owned_by: Literal["tpo"] = "tpo"
    reward_models: list[str] = Field(description="reward models that stand beside it on one worker")
    workers: int


class ModelList(Wire):
    """What the workers serve now."""

    object: Literal["list"] = "list"
    data: list[Model]


class RewardModel(Wire):
    """A reward model that live workers serve."""

    id: str
    object: Literal["reward_model"] = "reward_model"
    created: int = Field(description="since when it is served")
    models: list[str] = Field(description="policies that stand beside it on one worker")
    workers: int


class RewardModelList(Wire):
    """What the workers serve now."""

    object: Literal["list"] = "list"
    data: list[RewardModel]


class PromptSet(Wire):
    """A set of prompts that a job can name."""

    id: str
    object: Literal["prompt_set"] = "prompt_set"
    version: int
    style: Literal["conversation", "separate"]
    default: bool


class PromptSetList(Wire):
    """The sets that ship."""

    object: Literal["list"] = "list"
    data: list[PromptSet]


class Health(Wire):
    """The process lives."""

    status: Literal["ok"] = "ok"


Check = Literal["ok", "missing", "unknown"]
QueueCheck = Literal["ok", "stalled", "unknown"]
DiskCheck = Literal["ok", "full", "unknown"]


class Checks(Wire):
    """What the API needs around it."""

    database: Check
    broker: Check
    worker: Check
    queue: QueueCheck = Field(description="stalled: jobs wait although workers that serve them have free slots")
    disk: DiskCheck = Field(description="the disk that holds the database")


class Ready(Wire):
    """All that a job needs is there."""

    status: Literal["ready"] = "ready"
    checks: Checks


class Welcome(Wire):
    """Where to go from here."""

    name: str
    version: str
    docs: str
    openapi: str
    jobs: str
    ready: str
