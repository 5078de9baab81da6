"""Rules that end a run before its last iteration, which keep all results so far."""

from typing import Any

import pytest
from pydantic import ValidationError

from testing.fakes import FakePolicy, FakeReward, new_state, proceed, sample_text, step, text_per_seed
from tpo.core.errors import NoUsableSampleError
from tpo.core.loop import Position, locate, pending
from tpo.core.run import run
from tpo.core.state import Decline, Params, State


def finish(state: State, *means: float, policy: FakePolicy | None = None) -> State:
    """Run to the end with reward means[i] for the samples of iteration i, and the last mean for later ones."""

    def reward(text: str) -> float:
        return means[min(int(text.split()[1].split("-")[0]), len(means) - 1)]

    return run(state, policy or FakePolicy(), FakeReward(reward if means else float), lambda _: None, proceed)


def call_letters(state: State) -> str:
    """Return one letter for each call: S(ample), r (score), l (critique), g(radient), U(pdate)."""
    return "".join(
        {"sample": "S", "score": "r", "critique": "l", "gradient": "g", "update": "U"}[c.kind] for c in state.calls
    )


ALL_CALLS = "SrlgUrlgUr"


@pytest.mark.parametrize(
    ("budget", "calls", "position"),
    [
        # 2 samples of 5 tokens each, notes of 5 tokens. A policy call takes 0.25 s and a score 0.125 s.
        ({"max_output_tokens": 1}, "Sr", Position(0, None, 1, "max_output_tokens")),
        ({"max_output_tokens": 10}, "Sr", Position(0, None, 1, "max_output_tokens")),
        ({"max_output_tokens": 11}, "Srl", Position(1, None, 1, "max_output_tokens")),
        ({"max_output_tokens": 20}, "Srlg", Position(1, None, 1, "max_output_tokens")),
        ({"max_output_tokens": 21}, "SrlgUr", Position(1, None, 2, "max_output_tokens")),
        ({"max_output_tokens": 10_000}, ALL_CALLS, Position(2, None, 3)),
        ({"max_total_tokens": 11}, "Sr", Position(0, None, 1, "max_total_tokens")),
        ({"max_seconds": 0.2}, "Sr", Position(0, None, 1, "max_seconds")),
        ({"max_seconds": 0.376}, "Srl", Position(1, None, 1, "max_seconds")),
        ({"max_seconds": 60.0}, ALL_CALLS, Position(2, None, 3)),
    ],
)
def test_budget_ends_run_before_next_policy_call(budget: dict[str, Any], calls: str, position: Position) -> None:
    last = finish(new_state(sample_size=2, max_iterations=2, **budget), 1.0, 2.0, 3.0)
    assert call_letters(last) == calls
    assert locate(last) == position
    assert last.best is not None
    assert all(c.reward is not None for c in last.candidates), "all samples are scored"


def test_prompts_count_in_total_token_budget_only() -> None:
    state = new_state("word " * 100, sample_size=1, max_iterations=3)
    output_only = state.params.model_copy(update={"max_output_tokens": 100})
    total = state.params.model_copy(update={"max_total_tokens": 100})
    assert call_letters(finish(state.model_copy(update={"params": total}), 1.0)) == "Sr"
    assert len(call_letters(finish(state.model_copy(update={"params": output_only}), 1.0))) > 6


def test_budget_without_usable_sample_fails_with_reason() -> None:
    policy = FakePolicy(lambda _r, _s: sample_text("cut o", "length"))
    with pytest.raises(NoUsableSampleError, match="budget max_output_tokens did not allow a second round"):
        finish(new_state(max_output_tokens=1), 1.0, policy=policy)
    assert len(policy.requests) == 1


@pytest.mark.parametrize(
    ("rule", "means", "iterations"),
    [
        ({"patience": 1}, (1, 2, 3, 4, 5, 6), 5),
        ({"patience": 1}, (1, 2, 2, 3, 4), 2),
        ({"patience": 2}, (1, 2, 2, 3, 3, 3), 5),
        ({"patience": 2}, (1, 0, 0, 9), 2),
        ({"patience": 5}, (1, 1, 1, 1, 1, 1), 5),
        ({"patience": 1, "min_gain": 0.5}, (1, 1.5, 9), 1),
        ({"patience": 1, "min_gain": 0.5}, (1, 1.75, 2, 9), 2),
        ({"patience": 3, "min_gain": 1}, (1, 1.5, 2, 2.5, 3, 3.5), 5),
        ({"patience": 3, "min_gain": 2}, (1, 1.5, 2, 2.5, 3, 3.5), 3),
    ],
)
def test_early_stop_ends_run_without_gain(rule: dict[str, Any], means: tuple[float, ...], iterations: int) -> None:
    last = finish(new_state(sample_size=2, max_iterations=5, early_stop=rule), *means)
    assert len(last.iterations) == iterations
    assert locate(last) == Position(iterations, None, iterations + 1, "early_stop" if iterations < 5 else None)


def test_early_stop_uses_best_and_decline_uses_mean() -> None:
    # The best rises and the mean falls, then the other way round.
    def run_with(rewards: FakeReward, **params: Any) -> State:
        return run(new_state(sample_size=3, max_iterations=4, **params), FakePolicy(), rewards, lambda _: None, proceed)

    worse = FakeReward(
        lambda text: {"0-0": 1.0, "1-0": 2.0}.get(text.split()[1], 0.9 if text.split()[1][0] == "0" else 0.0)
    )
    last = run_with(worse, stop_on_decline=True)
    assert (len(last.iterations), locate(last).stopped) == (1, "decline")
    assert last.best is not None
    assert last.best.id == "1-0"
    assert list(last.declines) == [1]
    assert last.declines[1].mean_reward == pytest.approx(2 / 3)
    assert last.declines[1].mean_reward_before == pytest.approx(2.8 / 3)
    last = run_with(worse, early_stop={"patience": 1})
    assert (len(last.iterations), locate(last).stopped) == (2, "early_stop")
    assert locate(run_with(worse)).stopped is None


def test_iteration_without_candidate_is_neither_gain_nor_decline() -> None:
    policy = FakePolicy(lambda r, s: sample_text("no tags") if r.kind == "update" else text_per_seed(r, s))
    last = finish(new_state(max_iterations=4, early_stop={"patience": 2}, stop_on_decline=True), 1.0, policy=policy)
    assert (len(last.iterations), locate(last).stopped) == (2, "early_stop")
    assert last.declines == {}


def test_decline_compares_with_last_scored_iteration() -> None:
    policy = FakePolicy(
        lambda r, s: sample_text("no tags") if r.kind == "update" and r.iteration == 1 else text_per_seed(r, s)
    )
    last = finish(new_state(sample_size=2, max_iterations=3), 5.0, 0.0, 4.0, 4.5, policy=policy)
    assert last.declines == {2: Decline(2, 4.0, 5.0)}


def test_extended_job_counts_own_iterations_only() -> None:
    params: dict[str, Any] = {"early_stop": {"patience": 2}, "stop_on_decline": True, "max_output_tokens": 60}
    ended = finish(new_state(sample_size=2, max_iterations=2), 3.0, 2.0, 1.0)
    assert ended.usage.output_tokens == 50
    longer = Params.model_validate({**ended.params.model_dump(), "max_iterations": 9, **params})
    again = ended.model_copy(update={"params": longer, "calls": ()})
    assert pending(again) is not None
    last = finish(again, 3.0, 2.0, 1.0, 1.5, 1.5)
    assert len(last.iterations) == 4
    assert locate(last).stopped == "early_stop"


def test_stop_rules_are_off_by_default() -> None:
    assert (Params().early_stop, Params().stop_on_decline) == (None, False)
    assert call_letters(finish(new_state(sample_size=2, max_iterations=2), 3.0, 2.0, 1.0)) == ALL_CALLS


@pytest.mark.parametrize(
    "params",
    [
        {"max_output_tokens": 0},
        {"max_total_tokens": -1},
        {"max_seconds": 0},
        {"max_seconds": float("nan")},
        {"max_seconds": float("inf")},
        {"early_stop": {"patience": 0}},
        {"early_stop": {"patience": 1.5}},
        {"early_stop": {"patience": "2"}},
        {"early_stop": {"min_gain": -0.1}},
        {"early_stop": {"min_gain": float("nan")}},
        {"early_stop": {"margin": 1}},
        {"early_stop": True},
    ],
)
def test_params_refuse_invalid_stop_rules(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Params(**params)


def test_locate_reports_position_at_each_step() -> None:
    state = new_state(sample_size=2, max_iterations=1)
    seen = [locate(state)]
    while pending(state) is not None:
        state = step(state)
        seen.append(locate(state))
    phases = ["sampling", "scoring", "critique", "gradient", "update", "scoring", None]
    assert [(w.iteration, w.phase, w.complete) for w in seen] == [
        (i, p, c) for i, p, c in zip((0, 0, 1, 1, 1, 1, 1), phases, (0, 0, 1, 1, 1, 1, 2), strict=True)
    ]
