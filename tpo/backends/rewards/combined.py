"""Combined reward: the weighted sum of its parts, reported together with each part's value."""

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
    read_reward_file,
)
from tpo.backends.rewards.judge import Judge
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.errors import ModelRefusedError
from tpo.core.ports import Interrupt, Policy, RewardModel, Rewards, Score
from tpo.core.state import RewardPart
from tpo.settings import Settings

LoadReward = Callable[[RewardSpec, Settings], RewardModel]
LoadPolicy = Callable[[ModelSpec, Settings], Policy]


class VerifierReward:
    """A reward model that applies a verifier to each response."""

    def __init__(self, verifier: verifiers.Verifier) -> None:
        self._verifier = verifier

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Return one value for each response."""
        values = []
        for response in request.responses:
            interrupt()
            values.append(self._verifier(response))
        return Rewards(values=tuple(values), input_tokens=0, seconds=0.0)


class RescaledReward:
    """A reward model whose scores are shifted and scaled, so that several models share one scale."""

    def __init__(self, model: RewardModel, offset: float, scale: float) -> None:
        self._model = model
        self._offset = offset
        self._scale = scale

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Return (score - offset) / scale for each response."""
        rewards = self._model.score(request, interrupt)
        values = tuple((value - self._offset) / self._scale for value in rewards.values)
        return rewards.model_copy(update={"values": values})


class CombinedReward:
    """The weighted sum of its parts. If a part is not finite, neither is the sum, and the response never wins."""

    def __init__(self, parts: Sequence[tuple[str, float, RewardModel]], owned: Sequence[object] = ()) -> None:
        self._parts = tuple(parts)
        self._owned = tuple(owned)

    @property
    def healthy(self) -> bool:
        """False when a part would fail every further request."""
        return all(getattr(owned, "healthy", True) for owned in self._owned)

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses with each part in order.

        Raises BadReplyError if a part returns the wrong number of scores, and whatever a part raises.
        """
        started = time.perf_counter()
        columns: list[list[tuple[RewardPart, ...]]] = []
        input_tokens = 0
        for name, weight, model in self._parts:
            interrupt()
            rewards = model.score(request, interrupt)
            rewards.check_count(f"The reward part {name}", len(request.responses))
            input_tokens += rewards.input_tokens
            details = rewards.parts or ((),) * len(rewards.values)
            columns.append(
                [
                    (RewardPart(name=name, value=float(value), weight=weight), *_unweighted(name, detail))
                    for value, detail in zip(rewards.values, details, strict=True)
                ]
            )
        responses = [tuple(part for cell in row for part in cell) for row in zip(*columns, strict=True)]
        return Rewards(
            values=tuple(_sum(parts) for parts in responses),
            input_tokens=input_tokens,
            seconds=time.perf_counter() - started,
            parts=tuple(responses),
        )

    def close(self) -> None:
        """Close the models and plug-ins that were loaded for this reward."""
        for owned in self._owned:
            if callable(close := getattr(owned, "close", None)):
                close()


def load_combined(
    file: Path, settings: Settings, load_reward: LoadReward, load_policy: LoadPolicy, policy: Policy | None
) -> CombinedReward:
    """Load the reward that a file describes, with all its models. Raises ModelRefusedError if that is not possible."""
    parts: list[tuple[str, float, RewardModel]] = []
    owned: list[object] = []
    described = read_reward_file(file).part
    for part in described:  # A missing key is reported before any model is loaded.
        _key(part, settings)
    try:
        for part in described:
            model, loaded = _create_part(part, settings, load_reward, load_policy, policy)
            parts.append((part.name, part.weight, model))
            owned += loaded
    except BaseException:
        CombinedReward(parts, owned).close()
        raise
    return CombinedReward(parts, owned)


def _create_part(
    part: Part, settings: Settings, load_reward: LoadReward, load_policy: LoadPolicy, policy: Policy | None
) -> tuple[RewardModel, list[object]]:
    """Create a part's reward model; also return the objects to close with it."""
    match part:
        case LengthPart():
            return VerifierReward(verifiers.length(part)), []
        case RegexPart():
            return VerifierReward(verifiers.pattern(part)), []
        case JsonPart():
            return VerifierReward(verifiers.json_schema(part)), []
        case PluginPart():
            plugin = plugins.load(part.plugin, part.options)
            return plugin, [plugin]
        case ModelPart():
            reward = RewardSpec(part.model, part.url, _key(part, settings), part.task, part.tokenizer, part.bounded)
            model = load_reward(reward, settings)
            rescales = (part.offset, part.scale) != (0, 1)
            return (RescaledReward(model, part.offset, part.scale) if rescales else model), [model]
        case JudgePart(policy="policy"):
            if policy is None:
                raise ModelRefusedError(
                    f'The judge {part.name} needs policy = "{OWN_POLICY}", but this process has no policy.'
                )
            return Judge(part, policy), []
        case JudgePart():
            spec = ModelSpec(
                part.policy,
                part.url,
                _key(part, settings),
                max_tokens_field=part.limit_name,
                extra_body=part.extra_body,
            )
            judge = load_policy(spec, settings)
            return Judge(part, judge), [judge]


def _key(part: Part, settings: Settings) -> SecretStr | None:
    """Look up the API key that a part names. Raises ModelRefusedError if the settings do not contain it."""
    name = part.key if isinstance(part, ModelPart | JudgePart) else None
    if name is None:
        return None
    if name not in settings.server_api_keys:
        raise ModelRefusedError(
            f"The reward part {part.name} needs the key {name}, which TPO_SERVER_API_KEYS does not contain."
        )
    return settings.server_api_keys[name]


def _unweighted(name: str, parts: Sequence[RewardPart]) -> list[RewardPart]:
    """Return the details of a part that have weight 0, prefixed with the part's name."""
    return [part.model_copy(update={"name": f"{name}.{part.name}"}) for part in parts if part.weight == 0]


def _sum(parts: Sequence[RewardPart]) -> float:
    """Sum the weighted values. A part with weight 0 is informational: it has no effect, even if it is NaN."""
    values = [part.value * part.weight for part in parts if part.weight != 0 and part.value is not None]
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
