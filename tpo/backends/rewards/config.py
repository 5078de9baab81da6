"""What stands in a reward file, and what is wrong with one."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tpo.core.errors import ModelRefusedError
from tpo.settings import REMOTE_REWARDS, check_extra_body, check_server_url
from tpo.validation_messages import invalid

OWN_POLICY = "policy"
"""The judge that is the worker's own policy."""


def _pattern(text: str) -> str:
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return text


def _url(address: str | None) -> str | None:
    if address is not None:
        check_server_url("url", address)
    return address


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        jsonschema_rs.validator_for(schema)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise ValueError(f"is no JSON schema: {str(error).splitlines()[0]}") from None
    return schema


Url = Annotated[str | None, AfterValidator(_url)]


class _Part(BaseModel):
    """What every part has. The reward is the sum of all values, each times its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    weight: float = Field(1.0, allow_inf_nan=False)


class ModelPart(_Part):
    """A reward model's raw score, (score - offset) / scale."""

    kind: Literal["model"]
    model: str = Field(min_length=1, description="what TPO_REWARD_MODEL may be")
    url: Url = None
    key: str | None = Field(None, description="a name in TPO_SERVER_API_KEYS")
    task: Literal["classify", "token_classify"] = "classify"
    tokenizer: str | None = None
    bounded: bool = False
    offset: float = Field(0.0, allow_inf_nan=False)
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_an_address(self) -> "ModelPart":
        if self.model.startswith(REMOTE_REWARDS) != (self.url is not None):
            raise ValueError("url belongs to the models vllm:…, vllm-pooling:… and sglang:…, and they need it")
        return self


class JudgePart(_Part):
    """A language model's judgement of each response."""

    kind: Literal["judge"]
    policy: str = Field(OWN_POLICY, min_length=1, description="what TPO_POLICY may be, or policy: the worker's own")
    url: Url = None
    key: str | None = Field(None, description="a name in TPO_SERVER_API_KEYS")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: Annotated[dict[str, Any], AfterValidator(check_extra_body)] = {}
    mode: Literal["rubric", "pairwise"] = "rubric"
    rubric: str = Field(
        "How helpful, correct and complete is the response, and does it do what the user asked for?", min_length=1
    )
    lowest: int = 1
    highest: int = 10
    samples: int = Field(1, ge=1, le=16, description="judgements of each response; the value is their mean")
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int = Field(1024, ge=1, le=131072)

    @model_validator(mode="after")
    def _makes_sense(self) -> "JudgePart":
        if self.lowest >= self.highest:
            raise ValueError("lowest must be below highest")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0: without it they are all the same")
        if self.policy.startswith("openai:") != (self.url is not None):
            raise ValueError("url belongs to a policy openai:…, and that one needs it")
        return self


class LengthPart(_Part):
    """0 within the bounds, and below 0 outside: minus the share by which a bound is missed."""

    kind: Literal["length"]
    unit: Literal["words", "characters"] = "words"
    least: int = Field(0, ge=0)
    most: int = Field(ge=1)

    @model_validator(mode="after")
    def _makes_sense(self) -> "LengthPart":
        if self.least > self.most:
            raise ValueError("least must not be above most")
        return self


class RegexPart(_Part):
    """1 where the pattern is found anywhere in the response (or, with `absent`, nowhere), else 0."""

    kind: Literal["regex"]
    pattern: Annotated[str, AfterValidator(_pattern)]
    absent: bool = False


class JsonPart(_Part):
    """1 where the response is JSON, whole or in one fenced block, that fits the schema, else 0."""

    kind: Literal["json"]
    # No `schema`: pydantic's models have a method of that name.
    json_schema: Annotated[dict[str, Any], AfterValidator(_schema)] = Field({}, alias="schema")


class PluginPart(_Part):
    """What an installed package offers under the entry point group `tpo.rewards`."""

    kind: Literal["plugin"]
    plugin: str = Field(min_length=1)
    options: dict[str, Any] = {}


Part = Annotated[ModelPart | JudgePart | LengthPart | RegexPart | JsonPart | PluginPart, Field(discriminator="kind")]


class RewardFile(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: list[Part] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def _names_differ(self) -> "RewardFile":
        names = [part.name for part in self.part]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parts need names of their own: {', '.join(twice)}")
        return self


def read(file: Path) -> RewardFile:
    """What a reward file says. Raises ModelRefusedError, which names the field."""
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file} is no TOML: {error}") from error
    try:
        return RewardFile.model_validate(said)
    except ValidationError as error:
        raise ModelRefusedError(f"TPO_REWARD_FILE: {file}: {invalid(error)}") from error
