"""Schema of a reward file, and its validation."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tpo.backends.rewards.schemas import compile_schema
from tpo.core.errors import ModelRefusedError
from tpo.settings import REMOTE_REWARDS, check_extra_body, check_server_url
from tpo.validation_messages import invalid

OWN_POLICY = "policy"
"""Value of `policy` that makes the worker's own policy the judge."""


def _check_pattern(text: str) -> str:
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


def _check_server_url(address: str | None) -> str | None:
    if address is not None:
        check_server_url("url", address)
    return address


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    compile_schema(schema)
    return schema


Url = Annotated[str | None, AfterValidator(_check_server_url)]


class _Part(BaseModel):
    """Fields common to all parts. The reward is the sum of all values, each multiplied by its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    weight: float = Field(1.0, allow_inf_nan=False)


class ModelPart(_Part):
    """A reward model's raw score, rescaled to (score - offset) / scale."""

    kind: Literal["model"]
    model: str = Field(min_length=1, description="Name of a reward model, as in TPO_REWARD_MODEL.")
    url: Url = None
    key: str | None = Field(None, description="Name of a key in TPO_SERVER_API_KEYS.")
    task: Literal["classify", "token_classify"] = "classify"
    tokenizer: str | None = None
    bounded: bool = False
    offset: float = Field(0.0, allow_inf_nan=False)
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_url(self) -> "ModelPart":
        if self.model.startswith(REMOTE_REWARDS) != (self.url is not None):
            raise ValueError("url belongs to the models vllm:…, vllm-pooling:… and sglang:…, which require it")
        return self


class JudgePart(_Part):
    """A language model's judgement of each response."""

    kind: Literal["judge"]
    policy: str = Field(
        OWN_POLICY, min_length=1, description="Name of a policy, as in TPO_POLICY, or `policy` for the worker's own."
    )
    url: Url = None
    key: str | None = Field(None, description="Name of a key in TPO_SERVER_API_KEYS.")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: Annotated[dict[str, Any], AfterValidator(check_extra_body)] = {}
    mode: Literal["rubric", "pairwise"] = "rubric"
    rubric: str = Field(
        "How helpful, correct and complete is the response, and does it do what the user asked for?", min_length=1
    )
    lowest: int = 1
    highest: int = 10
    samples: int = Field(1, ge=1, le=16, description="Judgements of each response; the value is their mean.")
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int = Field(1024, ge=1, le=131072)

    @model_validator(mode="after")
    def _check_consistency(self) -> "JudgePart":
        if self.lowest >= self.highest:
            raise ValueError("lowest must be below highest")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0; at temperature 0 all samples are equal")
        if self.policy.startswith("openai:") != (self.url is not None):
            raise ValueError("url belongs to a policy openai:…, which requires it")
        return self


class LengthPart(_Part):
    """Length check: 0 within the bounds; outside, minus the fraction by which the bound is missed."""

    kind: Literal["length"]
    unit: Literal["words", "characters"] = "words"
    least: int = Field(0, ge=0)
    most: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_consistency(self) -> "LengthPart":
        if self.least > self.most:
            raise ValueError("least must not be above most")
        return self


class RegexPart(_Part):
    """Pattern check: 1 if the pattern is found anywhere in the response (with `absent`: nowhere), else 0."""

    kind: Literal["regex"]
    pattern: Annotated[str, AfterValidator(_check_pattern)]
    absent: bool = False


class JsonPart(_Part):
    """JSON check: 1 if the response, or its one fenced block, is JSON that matches the schema, else 0."""

    kind: Literal["json"]
    # Not named `schema`: pydantic models have a method of that name.
    json_schema: Annotated[dict[str, Any], AfterValidator(_check_schema)] = Field({}, alias="schema")


class PluginPart(_Part):
    """A reward that an installed package provides under the entry point group `tpo.rewards`."""

    kind: Literal["plugin"]
    plugin: str = Field(min_length=1)
    options: dict[str, Any] = {}


Part = Annotated[ModelPart | JudgePart | LengthPart | RegexPart | JsonPart | PluginPart, Field(discriminator="kind")]


class RewardFile(BaseModel):
    """A complete reward file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: list[Part] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def _check_unique_names(self) -> "RewardFile":
        names = [part.name for part in self.part]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"part names must be unique; used more than once: {', '.join(duplicates)}")
        return self


def read_reward_file(file: Path) -> RewardFile:
    """Read and validate a reward file. Raises ModelRefusedError, which names the invalid field."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # Not UTF-8, or not TOML.
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file} is not valid TOML: {error}") from error
    try:
        return RewardFile.model_validate(values)
    except ValidationError as error:
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file}: {invalid(error)}") from error
