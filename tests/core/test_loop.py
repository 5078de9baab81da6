"""The algorithm: the order of calls, the inputs of each call, seeds, and resuming from any checkpoint."""

import math
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.fakes import FakePolicy, FakeReward, new_state, proceed, sample_text, step, tagged, text_per_seed
from tests.support.runs import call_kinds, finish, reward_by_first_word
from tpo.core import loop
from tpo.core.errors import NoUsableSampleError
from tpo.core.loop import Position, locate, pending
from tpo.core.ports import Generate, Score, Text
from tpo.core.prompts import PromptSet, load, names
from tpo.core.requests import SHOWN_TOKENS, derived_seed, query_text
from tpo.core.run import run
from tpo.core.state import EarlyStop, Message, Params, State

# Order of calls


def test_run_makes_calls_in_order() -> None:
    last = finish(new_state(sample_size=3, max_iterations=2))
    one = [("critique", 1), ("gradient", 1), ("update", 3), ("score", 3)]
    assert call_kinds(last) == [("sample", 0, 3), ("score", 0, 3)] + [(k, i, n) for i in (1, 2) for k, n in one]
    assert [c.number for c in last.calls] == list(range(1, 11))
    assert [c.id for c in last.candidates] == [f"{i}-{s}" for i in range(3) for s in range(3)]
    assert pending(last) is None
    assert locate(last) == Position(2, None, complete=3)


def test_depth_zero_is_best_of_n() -> None:
    zero = finish(new_state(sample_size=4, max_iterations=0))
    bon = finish(new_state(sample_size=4, max_iterations=9, mode="bon"))
    assert zero.candidates == bon.candidates
    assert zero.calls == bon.calls
    assert call_kinds(zero) == [("sample", 0, 4), ("score", 0, 4)]


def test_calls_use_their_sampling_settings() -> None:
    policy = FakePolicy()
    params = Params(
        max_iterations=1,
        temperature=0.5,
        top_p=0.6,
        max_tokens=70,
        critique_temperature=0.8,
        critique_top_p=0.9,
        critique_max_tokens=100,
        stop=("END",),
    )
    finish(new_state().model_copy(update={"params": params}), policy)
    for request in policy.requests:
        used = (request.temperature, request.top_p, request.max_tokens)
        assert used == ((0.5, 0.6, 70) if request.kind in ("sample", "update") else (0.8, 0.9, 100))
        # An answer in tags ends with its closing tag, and a critique may quote the stop string.
        assert request.stop == (("END",) if request.kind == "sample" else ())
    assert (Params().temperature, Params().top_p, Params().critique_top_p, Params().max_tokens) == (
        0.7,
        0.95,
        0.99,
        2048,
    )


def test_chosen_and_rejected_come_from_whole_pool() -> None:
    texts = {(0, 0): "middle", (0, 1): "low", (1, 0): "high", (1, 1): "lowest", (2, 0): "x", (2, 1): "y"}
    policy = FakePolicy(
        lambda r, s: (
            text_per_seed(r, s)
            if r.kind in ("critique", "gradient")
            else sample_text(tagged(texts[r.iteration, s]) if r.kind == "update" else texts[r.iteration, s])
        )
    )
    last = finish(
        new_state(sample_size=2), policy, reward_by_first_word({"high": 3, "middle": 2, "low": 1, "lowest": -5})
    )
    assert [(i.chosen, i.rejected) for i in last.iterations] == [("0-0", "0-1"), ("1-0", "1-1")]
    assert last.best is not None
    assert last.best.text == "high"


def test_first_of_equal_rewards_wins() -> None:
    last = finish(new_state(sample_size=3), reward=FakeReward(lambda _: 1.5))
    assert [(i.chosen, i.rejected) for i in last.iterations] == [("0-0", "0-0"), ("0-0", "0-0")]
    assert last.best is last.candidates[0]


def test_revision_sees_no_rejected_response() -> None:
    policy = FakePolicy()
    last = finish(new_state(sample_size=3, max_iterations=1, mode="revision"), policy)
    assert last.iterations[0].rejected is None
    assert last.worst is not None
    for request in policy.requests[1:]:
        assert last.worst.text not in "".join(m.content for m in request.messages)


# Inputs


def test_sample_receives_conversation_unchanged() -> None:
    turns = [("system", "Be brief."), ("user", "Hello {x} $query"), ("assistant", "Hi!"), ("user", "And now?")]
    messages = tuple(Message(role=r, content=c) for r, c in turns)
    policy, reward = FakePolicy(), FakeReward()
    state = new_state(sample_size=2, max_iterations=1).model_copy(update={"input": messages})
    finish(state, policy, reward)
    assert policy.requests[0].messages == messages
    assert all(request.messages == messages for request in reward.requests)
    shown = "[system]\nBe brief.\n\n[user]\nHello {x} $query\n\n[assistant]\nHi!\n\n[user]\nAnd now?"
    assert query_text(messages) == shown
    assert shown in policy.requests[1].messages[0].content
    assert query_text(messages[1:2]) == "Hello {x} $query"


@pytest.mark.parametrize("name", names())
def test_template_signs_reach_critic_unchanged(name: str) -> None:
    awkward = "costs $5, $query, ${critique} {0} <SEP> %s"
    policy = FakePolicy(lambda r, s: sample_text(f"{awkward} {s}" if r.kind == "sample" else f"{r.kind} {awkward}"))
    finish(new_state(f"why {awkward}", load(name), sample_size=2, max_iterations=1), policy)
    critique, gradient, update = policy.requests[1:4]
    assert f"why {awkward}" in critique.messages[-1].content
    assert all(f"{awkward} {s}" in critique.messages[-1].content for s in (0, 1))
    assert f"critique {awkward}" in "".join(m.content for m in gradient.messages)
    assert f"gradient {awkward}" in "".join(m.content for m in update.messages)


def test_long_candidate_is_cut_only_for_critic() -> None:
    long = "".join(f"word{i} " for i in range(4 * SHOWN_TOKENS)).strip()
    policy = FakePolicy(
        lambda r, s: sample_text(long, tokens=4 * SHOWN_TOKENS) if r.kind == "sample" else text_per_seed(r, s)
    )
    last = finish(new_state(sample_size=1, max_iterations=1), policy)
    prompt = policy.requests[1].messages[0].content
    assert long[: len(long) // 4] + " […]" in prompt
    assert long[: len(long) // 4 + 1] not in prompt
    assert last.candidates[0].text == long


def test_candidate_at_length_limit_is_shown_whole() -> None:
    text = "Just as long as it may be."
    policy = FakePolicy(
        lambda r, s: sample_text(text, tokens=SHOWN_TOKENS) if r.kind == "sample" else text_per_seed(r, s)
    )
    finish(new_state(sample_size=1, max_iterations=1), policy)
    assert policy.requests[1].messages[0].content.count(text) == 1
    assert "[…]" not in policy.requests[1].messages[0].content


def test_run_works_with_one_sample() -> None:
    last = finish(new_state(sample_size=1))
    assert len(last.candidates) == 3
    assert last.iterations[0].rejected == "0-0"
    assert last.best is not None


def test_prompt_is_rendered_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    located: list[State] = []
    render, find = PromptSet.render, loop.locate

    def counted_render(prompts: PromptSet, prompt_step: Any, texts: Any) -> Any:
        rendered.append(prompt_step)
        return render(prompts, prompt_step, texts)

    def counted_locate(state: State) -> Position:
        located.append(state)
        return find(state)

    monkeypatch.setattr(PromptSet, "render", counted_render)
    monkeypatch.setattr("tpo.core.run.locate", counted_locate)
    last = finish(new_state(sample_size=5, max_iterations=2))
    assert [call.kind for call in last.calls] == ["sample", "score", *["critique", "gradient", "update", "score"] * 2]
    assert rendered == ["critique", "gradient", "update"] * 2
    assert len(located) == len(last.calls) + 1


# Seeds and resuming


def test_derived_seed_depends_on_job_and_position_only() -> None:
    # A literal value, because jobs of an earlier version must continue with the same seeds.
    assert derived_seed(0, 0, "sample", 0) == 984332543912391782
    assert derived_seed(7, 1, "critique", 0) == derived_seed(7, 1, "critique", 0)


@given(st.integers(0, 2**63 - 1), st.integers(1, 8), st.integers(0, 4))
@settings(max_examples=30)
def test_seeds_are_unique_within_a_run(seed: int, n: int, depth: int) -> None:
    policy = FakePolicy(lambda r, s: sample_text("") if s < r.n and r.kind == "update" else text_per_seed(r, s))
    finish(new_state(sample_size=n, max_iterations=depth, seed=seed), policy)
    seeds = [s for r in policy.requests for s in r.seeds]
    assert len(seeds) == len(set(seeds)) == n + depth * (2 + 2 * n)
    assert all(0 <= s < 2**63 for s in seeds)
    for request in policy.requests:
        samples = range(request.first_sample, request.first_sample + request.n)
        assert request.seeds == tuple(derived_seed(seed, request.iteration, request.kind, s) for s in samples)


REPLIES = ["{}", "same", "", " ", "untagged {}", "cut {}", "{} \x00 🎉"]
REWARDS = st.sampled_from([0.0, -0.0, 1.0, 1.0, -3.5, 1e300, math.nan, math.inf, -math.inf])
MODES = st.sampled_from(["tpo", "revision", "bon"])
RULES = st.fixed_dictionaries(
    {},
    optional={
        "max_output_tokens": st.integers(1, 150),
        "max_total_tokens": st.integers(1, 1500),
        "max_seconds": st.floats(0.1, 4),
        "early_stop": st.builds(EarlyStop, patience=st.integers(1, 3), min_gain=st.sampled_from([0.0, 1.0])),
        "stop_on_decline": st.booleans(),
    },
)


def scripted(replies: list[str]) -> FakePolicy:
    """Return a policy that picks its reply by the kind, position and seed of the request."""

    def reply_to(request: Generate, sample: int) -> Text:
        position = f"{request.kind} {request.iteration} {sample} {request.seeds[sample - request.first_sample]}"
        reply = replies[zlib.crc32(position.encode()) % len(replies)]
        text = reply.format(position)
        if request.kind == "update" and text.strip() and not reply.startswith("untagged"):
            text = tagged(text)
        return sample_text(text, "length" if reply.startswith("cut") else "stop")

    return FakePolicy(reply_to)


def assert_within_budget(last: State) -> None:
    """Assert that no call of the policy was started after a budget was used up."""
    before = last.model_copy(
        update={"calls": last.calls[: max(i for i, c in enumerate(last.calls) if c.kind != "score")]}
    )
    params, used = last.params, before.usage
    for limit, spent in (
        (params.max_output_tokens, used.output_tokens),
        (params.max_total_tokens, used.total_tokens),
        (params.max_seconds, used.model_seconds),
    ):
        assert limit is None or spent < limit


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(REPLIES), min_size=1, max_size=8),
    st.lists(REWARDS, min_size=1, max_size=6),
    MODES,
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 2**63 - 1),
    st.sampled_from(names()),
    RULES,
)
def test_run_resumes_identically_from_any_checkpoint(
    replies: list[str],
    rewards: list[float],
    mode: str,
    n: int,
    depth: int,
    seed: int,
    prompts: str,
    rules: dict[str, Any],
) -> None:
    def resume(state: State) -> tuple[list[State], str | None]:
        """Return every checkpoint, and the message of the failure if the run ends in one."""
        saved: list[State] = []
        reward = FakeReward(lambda text: rewards[zlib.crc32(text.encode()) % len(rewards)])
        try:
            last = run(state, scripted(replies), reward, lambda made: saved.append(made.after), proceed)
        except NoUsableSampleError as error:
            return saved, str(error)
        assert last == (saved[-1] if saved else state)
        return saved, None

    state = new_state("Why? $x", load(prompts), mode=mode, sample_size=n, max_iterations=depth, seed=seed, **rules)
    saved, failure = resume(state)
    for done, checkpoint in enumerate([state, *saved]):
        back = State.model_validate_json(checkpoint.model_dump_json())
        assert back == checkpoint
        assert resume(back) == (saved[done:], failure)
    last = saved[-1]
    assert (failure is None) == (last.best is not None)
    # Each call happens at most twice: samples and scores, and critique, gradient, update and scores per iteration.
    assert len(last.calls) <= 4 + 8 * last.params.iterations
    assert [locate(s).stopped for s in saved[:-1]] == [None] * (len(saved) - 1)
    if not rules:
        assert locate(last).stopped is None
    assert_within_budget(last)
    if last.best:
        assert all(math.isfinite(c.reward or 0) and not c.unusable for c in last.pool)
        assert last.best == next(c for c in last.pool if c.reward == max(c.reward or 0 for c in last.pool))


def test_usage_is_sum_of_calls() -> None:
    last = finish(new_state(sample_size=2, max_iterations=1))
    assert last.usage.output_tokens == sum(c.tokens for c in last.candidates) + sum(
        c.output_tokens for c in last.calls if c.kind in ("critique", "gradient")
    )
    assert last.usage.reward_tokens == 14
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    scored = [c.reward for c in last.of_iteration(0) if c.reward is not None]
    assert last.mean_reward(0) == pytest.approx(sum(scored) / 2)


def test_pending_changes_nothing() -> None:
    state = step(new_state(sample_size=2))
    assert pending(state) == pending(state)
    assert isinstance(pending(state), Score)
