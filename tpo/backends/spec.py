"""Specifications of models to load: a name, and how to use the server that it is behind, if any."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import SecretStr

from tpo.settings import Settings


@dataclass(frozen=True)
class ModelSpec:
    """A policy: demo, scripted, a folder, a name on the Hugging Face Hub, or openai:MODEL behind the server `url`."""

    name: str
    url: str | None = None
    api_key: SecretStr | None = None
    samples: Literal["batched", "separate"] = "batched"
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the policy that the settings name."""
        return cls(
            settings.policy,
            settings.openai_url,
            settings.openai_api_key,
            settings.openai_samples,
            settings.openai_max_tokens_field,
            settings.openai_extra_body,
        )


@dataclass(frozen=True)
class RewardSpec:
    """A reward model: demo, scripted, a folder, a name on the Hub, or vllm:MODEL and its relatives behind `url`."""

    name: str
    url: str | None = None
    api_key: SecretStr | None = None
    task: Literal["classify", "token_classify"] = "classify"
    tokenizer: str | None = None
    in_unit_interval: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the reward model that the settings name."""
        return cls(
            settings.reward_model,
            settings.reward_url,
            settings.reward_api_key,
            settings.reward_task,
            settings.reward_tokenizer,
            settings.reward_in_unit_interval,
        )
