"""The sum of parts, each times its weight; each response keeps what its reward is the sum of."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import SecretStr

from tpo.backends.rewards import plugins, verifiers
from tpo.backends.rewards.config import (
    OWN_POLICY,
    JsonPart,
    JudgePart,
    LengthPart,
    ModelPart,
    Part,
    PluginPart,
    RegexPart,
    read,
)
from tpo.backends.rewards.judge import Judge
from tpo.core.errors import BadReplyError, ModelRefusedError
from tpo.core.ports import Interrupt, Policy, RewardModel, Rewards, Score
from tpo.core.state import RewardPart
from tpo.settings import Settings

LoadReward = Callable[[str, Settings], RewardModel]
LoadPolicy = Callable[[str, Settings], Policy]


class Verified:
    """A reward model out of a function of the text."""

    def __init__(self, verifier: verifiers.Verifier) -> None:
        self._verifier = verifier

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """One value for each response."""
        values = []
        for response in request.responses:
            interrupt()
            values.append(self._verifier(response))
        return Rewards(values=tuple(values), input_tokens=0, seconds=0.0)


class Rescaled:
    """A reward model's scores, moved and scaled, so that several have one measure."""

    def __init__(self, model: RewardModel, offset: float, scale: float) -> None:
        self._model = model
        self._offset = offset
        self._scale = scale

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """(score - offset) / scale for each response."""
        rewards = self._model.score(request, interrupt)
        values = tuple((value - self._offset) / self._scale for value in rewards.values)
        return rewards.model_copy(update={"values": values})


class CombinedReward:
    """The weighted sum of its parts. A part that is not finite makes the sum not finite: that response never wins."""

    def __init__(self, parts: Sequence[tuple[str, float, RewardModel]], owned: Sequence[object] = ()) -> None:
        self._parts = tuple(parts)
        self._owned = tuple(owned)

    @property
    def healthy(self) -> bool:
        """False when a part would fail every further request."""
        return all(getattr(one, "healthy", True) for one in self._owned)

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses by each part in turn. Raises BadReplyError and what the parts raise."""
        started = time.perf_counter()
        columns: list[list[tuple[RewardPart, ...]]] = []
        read_tokens = 0
        for name, weight, model in self._parts:
            interrupt()
            rewards = model.score(request, interrupt)
            if len(rewards.values) != len(request.responses):
                raise BadReplyError(
                    f"The reward part {name} was given {len(request.responses)} responses and gave "
                    f"{len(rewards.values)} scores."
                )
            read_tokens += rewards.input_tokens
            notes = rewards.parts or ((),) * len(rewards.values)
            columns.append(
                [
                    (RewardPart(name=name, value=float(value), weight=weight), *_notes(name, noted))
                    for value, noted in zip(rewards.values, notes, strict=True)
                ]
            )
        responses = [tuple(part for cell in row for part in cell) for row in zip(*columns, strict=True)]
        return Rewards(
            values=tuple(_sum(parts) for parts in responses),
            input_tokens=read_tokens,
            seconds=time.perf_counter() - started,
            parts=tuple(responses),
        )

    def close(self) -> None:
        """Close what was loaded for this."""
        for one in self._owned:
            if callable(close := getattr(one, "close", None)):
                close()


def load_combined(
    file: Path, settings: Settings, load_reward: LoadReward, load_policy: LoadPolicy, policy: Policy | None
) -> CombinedReward:
    """The reward that a file describes, with all models in it loaded. Raises ModelRefusedError."""
    parts: list[tuple[str, float, RewardModel]] = []
    owned: list[object] = []
    described = read(file).part
    for part in described:  # before anything is loaded
        _key(part, settings)
    try:
        for part in described:
            model, loaded = _made(part, settings, load_reward, load_policy, policy)
            parts.append((part.name, part.weight, model))
            owned += loaded
    except BaseException:
        CombinedReward(parts, owned).close()
        raise
    return CombinedReward(parts, owned)


def _made(
    part: Part, settings: Settings, load_reward: LoadReward, load_policy: LoadPolicy, policy: Policy | None
) -> tuple[RewardModel, list[object]]:
    """A part's reward model, and what has to be closed with it."""
    match part:
        case LengthPart():
            return Verified(verifiers.length(part)), []
        case RegexPart():
            return Verified(verifiers.pattern(part)), []
        case JsonPart():
            return Verified(verifiers.json_schema(part)), []
        case PluginPart():
            plugin = plugins.load(part.plugin, part.options)
            return plugin, [plugin]
        case ModelPart():
            here = settings.model_copy(
                update={
                    "reward_url": part.url,
                    "reward_api_key": _key(part, settings),
                    "reward_task": part.task,
                    "reward_tokenizer": part.tokenizer,
                    "reward_in_unit_interval": part.bounded,
                }
            )
            model = load_reward(part.model, here)
            return (model if (part.offset, part.scale) == (0, 1) else Rescaled(model, part.offset, part.scale)), [model]
        case JudgePart(policy="policy"):
            if policy is None:
                raise ModelRefusedError(f'The judge {part.name} wants policy = "{OWN_POLICY}", and there is none here.')
            return Judge(part, policy), []
        case JudgePart():
            here = settings.model_copy(
                update={
                    "openai_url": part.url,
                    "openai_api_key": _key(part, settings),
                    "openai_samples": "batched",
                    "openai_max_tokens_field": part.limit_name,
                    "openai_extra_body": part.extra_body,
                }
            )
            judge = load_policy(part.policy, here)
            return Judge(part, judge), [judge]


def _key(part: Part, settings: Settings) -> SecretStr | None:
    name = part.key if isinstance(part, ModelPart | JudgePart) else None
    if name is None:
        return None
    if name not in settings.server_api_keys:
        raise ModelRefusedError(
            f"The reward part {part.name} wants the key {name}, which TPO_SERVER_API_KEYS does not hold."
        )
    return settings.server_api_keys[name]


def _notes(name: str, parts: Sequence[RewardPart]) -> list[RewardPart]:
    """What a part says of itself that is no part of the sum, under its name."""
    return [part.model_copy(update={"name": f"{name}.{part.name}"}) for part in parts if part.weight == 0]


def _sum(parts: Sequence[RewardPart]) -> float:
    """A weight of 0 is for looking on: such a part changes nothing, not even by being no number."""
    values = [part.value * part.weight for part in parts if part.weight != 0 and part.value is not None]
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
