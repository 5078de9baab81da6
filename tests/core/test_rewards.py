"""Combined rewards: the value of each kind of part, and their weighted sum."""

import math
from pathlib import Path

import pytest

from testing.fakes import proceed
from tests.support.rewards import FixedReward, load_reward_file, score_request
from tpo.backends import load_reward
from tpo.backends.rewards import verifiers
from tpo.backends.rewards.combined import CombinedReward
from tpo.core.errors import (
    BadReplyError,
    CallInterruptedError,
)
from tpo.core.ports import Interrupt, RewardModel, Rewards, Score
from tpo.core.state import RewardPart
from tpo.settings import Settings


def values(folder: Path, part: str, *responses: str) -> list[float]:
    """Return the rewards of responses from a file with this one part."""
    return list(
        load_reward_file(folder, f'[[part]]\nname = "a"\n{part}').score(score_request(*responses), proceed).values
    )


def test_length_part_scores_by_words_or_characters(tmp_path: Path) -> None:
    part = 'kind = "length"\nmost = 4\nleast = 2'
    assert values(tmp_path, part, "a b c d", "a b", "a", "", "a b c d e f", "w " * 8) == [0, 0, -0.5, -1, -0.5, -1]
    assert values(tmp_path, 'kind = "length"\nunit = "characters"\nmost = 4', "abcd", "abcdef") == [0, -0.5]


def test_regex_part_scores_presence_or_absence(tmp_path: Path) -> None:
    assert values(
        tmp_path,
        r"""kind = "regex"
pattern = '(?i)\bplease\b'""",
        "Please do.",
        "pleased",
    ) == [1, 0]
    assert values(tmp_path, "kind = 'regex'\npattern = 'as an AI'\nabsent = true", "Yes.", "as an AI I") == [1, 0]


def test_regex_timeout_affects_one_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "LONGEST_SEARCH_SECONDS", 0.2)
    found, stopped = values(tmp_path, "kind = 'regex'\npattern = '(a|aa)+$'", "aaa", "a" * 100 + "b")
    assert (found, math.isnan(stopped)) == (1, True)


def test_json_part_scores_by_schema(tmp_path: Path) -> None:
    part = 'kind = "json"\nschema = {type = "object", required = ["answer"]}'
    fenced = '```json\n{"answer": 1}\n```'
    responses = ('{"answer": 1}', fenced, '{"other": 1}', "[1]", "no", "", '{"answer": 1} and more', "[" * 100_000)
    assert values(tmp_path, part, *responses) == [1, 1, 0, 0, 0, 0, 0, 0]


SEVERAL = """
[[part]]
name = "quality"
kind = "model"
model = "scripted"
offset = 1.0
scale = 2.0
weight = 3.0

[[part]]
name = "short"
kind = "length"
most = 2
weight = 0.5

[[part]]
name = "observed"
kind = "regex"
pattern = "Draft"
weight = 0.0
"""


def test_combined_reward_is_weighted_sum_of_parts(tmp_path: Path) -> None:
    responses = ("Draft 4: one two", "short")
    raw = load_reward(Settings(reward_model="scripted")).score(score_request(*responses), proceed).values
    rewards = load_reward_file(tmp_path, SEVERAL).score(score_request(*responses), proceed)
    for value, parts, model, length in zip(rewards.values, rewards.parts, raw, (-1.0, 0.0), strict=True):
        assert [(p.name, p.weight) for p in parts] == [("quality", 3.0), ("short", 0.5), ("observed", 0.0)]
        assert [p.value for p in parts[:2]] == [pytest.approx((model - 1) / 2), length]
        assert value == pytest.approx(sum((p.value or 0) * p.weight for p in parts))
    assert [parts[2].value for parts in rewards.parts] == [1, 0]
    assert rewards.input_tokens > 0


def combined(*parts: tuple[float, RewardModel]) -> CombinedReward:
    """Return a combined reward of models with these weights."""
    return CombinedReward([(f"p{i}", weight, model) for i, (weight, model) in enumerate(parts)])


def test_zero_weight_part_ignores_nan() -> None:
    scores = FixedReward(1.0, math.nan, math.inf)
    assert [
        math.isfinite(v)
        for v in combined((1, scores), (1, FixedReward(0, 0, 0))).score(score_request(*"abc"), proceed).values
    ] == [
        True,
        False,
        False,
    ]
    assert combined((0, scores), (2, FixedReward(1, 2, 3))).score(score_request(*"abc"), proceed).values == (
        2,
        4,
        6,
    )


def test_combined_reward_names_part_with_too_few_scores() -> None:
    with pytest.raises(BadReplyError, match="part p1 returned 1 scores for 2 responses"):
        combined((1, FixedReward(1, 2)), (1, FixedReward(1))).score(score_request("a", "b"), proceed)


def test_combined_reward_checks_interrupt_before_each_part() -> None:
    class Cancels(FixedReward):
        def score(self, _request: Score, _interrupt: Interrupt) -> Rewards:
            cancelled.append(True)
            return self.rewards

    def interrupt() -> None:
        if cancelled:
            raise CallInterruptedError("cancelled")

    cancelled: list[bool] = []
    with pytest.raises(CallInterruptedError):
        combined((1, Cancels(1)), (1, Cancels(1))).score(score_request("a"), interrupt)
    assert len(cancelled) == 1


def test_combined_reward_prefixes_nested_parts() -> None:
    notes = (RewardPart(name="reward", value=5.0), RewardPart(name="share_read", value=0.5, weight=0))
    (parts,) = combined((2, FixedReward(5, parts=(notes,)))).score(score_request("a"), proceed).parts
    assert [(p.name, p.value, p.weight) for p in parts] == [("p0", 5, 2), ("p0.share_read", 0.5, 0)]


def test_combined_reward_health_and_close_follow_owned_models() -> None:
    owned = FixedReward(1)
    reward = CombinedReward([("a", 1, owned)], [owned])
    assert reward.healthy
    owned.healthy = False
    assert not reward.healthy
    reward.close()
    assert owned.closed
