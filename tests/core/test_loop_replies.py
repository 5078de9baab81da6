"""The algorithm: how unusable samples, blank or cut-off notes and invalid rewards are handled."""

import json
import math
from typing import Any

import pytest

from testing.fakes import FakePolicy, FakeReward, new_state, proceed, sample_text, step, tagged, text_per_seed
from tests.support.runs import call_kinds, finish, policy_with_updates, reward_by_first_word
from tpo.core.errors import BadReplyError, NoUsableSampleError
from tpo.core.loop import Position, apply, locate, pending
from tpo.core.ports import Generate, Generation, Rewards, Text
from tpo.core.run import run
from tpo.core.state import RewardPart, State


def test_unusable_first_samples_are_requested_again() -> None:
    policy = FakePolicy(lambda r, s: sample_text("") if r.kind == "sample" and s < 3 else text_per_seed(r, s))
    last = finish(new_state(sample_size=3, max_iterations=0), policy)
    assert call_kinds(last) == [("sample", 0, 3), ("sample", 0, 3), ("score", 0, 3)]
    assert [c.unusable for c in last.candidates] == ["empty"] * 3 + [None] * 3
    assert len({s for r in policy.requests for s in r.seeds}) == 6


def test_no_usable_first_sample_fails_with_reasons() -> None:
    saved: list[State] = []
    cut = FakePolicy(lambda r, s: sample_text("cut o", "length" if s % 2 else "stop"))
    nan = FakeReward(lambda _: math.nan)
    with pytest.raises(NoUsableSampleError, match=r"all 4 are cut_off, reward_not_finite.*max_tokens \(now 2048\)"):
        run(new_state(sample_size=2), cut, nan, lambda made: saved.append(made.after), proceed)
    assert call_kinds(saved[-1]) == [("sample", 0, 2), ("score", 0, 1)] * 2
    position = locate(saved[-1])
    assert position.failure
    assert position._replace(failure=None) == Position(0, None, complete=1)


def test_unusable_update_is_retried_once_then_skipped() -> None:
    policy = FakePolicy(
        lambda r, s: sample_text("no tags") if r.kind == "update" and r.iteration == 1 else text_per_seed(r, s)
    )
    last = finish(new_state(sample_size=2), policy)
    expected = [("critique", 1, 1), ("gradient", 1, 1), ("update", 1, 2), ("update", 1, 2), ("critique", 2, 1)]
    assert call_kinds(last)[2:7] == expected
    assert [c.unusable for c in last.of_iteration(1)] == ["no_answer_tags"] * 4
    assert last.mean_reward(1) is None
    assert len(list(last.of_iteration(2))) == 2
    first, second = (r.seeds for r in policy.requests if r.kind == "update" and r.iteration == 1)
    assert not set(first) & set(second)


def test_second_update_attempt_counts() -> None:
    last = finish(
        new_state(sample_size=2, max_iterations=1),
        policy_with_updates(lambda s: sample_text(tagged("ok") if s == 3 else "no tags")),
    )
    assert [(c.text, c.unusable) for c in last.of_iteration(1)][2:] == [("no tags", "no_answer_tags"), ("ok", None)]
    assert call_kinds(last)[-1] == ("score", 1, 1)


@pytest.mark.parametrize(
    ("reply", "finish_reason", "text", "unusable"),
    [
        (tagged("good"), "stop", "good", None),
        (f"Sure: {tagged(' good ')} Bye.", "stop", "good", None),
        (tagged("good") + " and then it went o", "length", "good", None),
        (tagged("draft") + "<improved_response>cut o", "length", None, "cut_off"),
        ("<improved_response>cut o", "length", None, "cut_off"),
        ("<improved_response>never closed", "stop", None, "no_answer_tags"),
        ("no tags", "stop", None, "no_answer_tags"),
        ("no tags", "length", None, "cut_off"),
        (tagged(""), "stop", None, "no_answer_tags"),
        (tagged("  \n"), "stop", None, "no_answer_tags"),
        ("  ", "stop", "", "empty"),
        ("", "length", "", "cut_off"),
        (f"I answer between {tagged(' and ')}: {tagged('good')}", "stop", "good", None),
        (tagged("a <SEP> b"), "stop", "a <SEP> b", None),
    ],
)
def test_update_answer_is_extracted(reply: str, finish_reason: Any, text: str | None, unusable: str | None) -> None:
    last = finish(
        new_state(sample_size=2, max_iterations=1),
        policy_with_updates(lambda s: sample_text(reply if s == 0 else tagged("x"), finish_reason)),
    )
    first = next(last.of_iteration(1))
    assert (first.text, first.unusable) == (reply if text is None else text, unusable)
    assert (first.reward is None) == (unusable is not None)


def test_cut_off_first_sample_is_unusable() -> None:
    policy = FakePolicy(lambda r, s: sample_text("cut o", "length") if s == 0 else sample_text(f" whole {s}\n"))
    reward = FakeReward()
    last = finish(new_state(sample_size=3, max_iterations=0), policy, reward)
    assert [(c.text, c.unusable) for c in last.candidates] == [
        ("cut o", "cut_off"),
        ("whole 1", None),
        ("whole 2", None),
    ]
    assert reward.requests[0].responses == ("whole 1", "whole 2")


def test_first_sample_keeps_its_tags() -> None:
    last = finish(new_state(sample_size=1, max_iterations=0), FakePolicy(lambda _r, _s: sample_text(tagged("inside"))))
    assert last.candidates[0].text == tagged("inside")


def test_candidate_keeps_reward_parts() -> None:
    def parts(text: str) -> tuple[RewardPart, ...]:
        return (RewardPart(name="a", value=float(len(text)), weight=2.0), RewardPart(name="b", value=math.nan))

    last = finish(new_state(sample_size=3, max_iterations=1), reward=FakeReward(parts=parts))
    assert len(last.candidates) == 6
    for candidate in last.candidates:
        first, second = candidate.parts
        assert (first.value, first.weight) == (len(candidate.text), 2.0)
        assert second.value is None
    assert State.model_validate_json(last.model_dump_json()) == last


def test_state_without_reward_parts_is_read() -> None:
    last = finish(new_state(sample_size=2, max_iterations=1))
    old = last.model_dump(mode="json")
    for candidate in old["candidates"]:
        assert candidate.pop("parts") == []
    assert State.model_validate(old) == last


def test_parts_for_only_some_responses_are_refused() -> None:
    state = step(new_state(sample_size=2))
    part = RewardPart(name="a", value=1.0)
    request = pending(state)
    assert request
    with pytest.raises(BadReplyError, match="2 scores, but parts for 1"):
        apply(state, request, Rewards(values=(1.0, 2.0), input_tokens=1, seconds=0.1, parts=((part,),)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_reward_never_wins(value: float) -> None:
    policy = FakePolicy(lambda r, s: sample_text(f"{s} of {r.kind}" if r.kind == "sample" else tagged(f"{s} again")))
    last = finish(new_state(sample_size=3), policy, reward_by_first_word({"0": value, "1": 1.0, "2": 2.0}))
    assert [c.unusable for c in last.of_iteration(0)] == ["reward_not_finite", None, None]
    assert last.best is not None
    assert last.worst is not None
    assert (last.best.id, last.worst.id) == ("0-2", "0-1")
    assert State.model_validate_json(last.model_dump_json()) == last


@pytest.mark.parametrize("kind", ["critique", "gradient"])
@pytest.mark.parametrize("cuts", [1, 2])
def test_cut_off_note_is_requested_again(kind: str, cuts: int) -> None:
    def reply(request: Generate, sample: int) -> Text:
        if request.kind == kind and sample < cuts:
            return sample_text(f"cut {sample}", "length")
        return text_per_seed(request, sample)

    last = finish(new_state(max_iterations=1), FakePolicy(reply))
    note = getattr(last.iterations[0], kind)
    assert note.attempt == 1
    assert (note.text == "cut 1") == (cuts == 2)
    assert list(last.of_iteration(1))


def test_reasoning_tokens_count_as_output_only() -> None:
    state = new_state(sample_size=1, max_iterations=1)
    reply = Generation(
        texts=(sample_text("Short. " * 50, tokens=100),), input_tokens=1, seconds=0, reasoning_tokens=8000
    )
    for each in (reply, Rewards(values=(1.0,), input_tokens=1, seconds=0)):
        request = pending(state)
        assert request
        state = apply(state, request, each)
    assert state.usage.output_tokens == 8100
    request = pending(state)
    assert isinstance(request, Generate)
    assert ("Short. " * 50).strip() in request.messages[0].content


@pytest.mark.parametrize("blanks", [1, 2])
@pytest.mark.parametrize("kind", ["critique", "gradient"])
def test_blank_note_is_retried_once_then_iteration_skipped(kind: str, blanks: int) -> None:
    policy = FakePolicy(
        lambda r, s: sample_text(" \n") if r.kind == kind and r.iteration == 1 and s < blanks else text_per_seed(r, s)
    )
    last = finish(new_state(sample_size=2), policy)
    requests = [r for r in policy.requests if r.kind == kind and r.iteration == 1]
    assert [r.first_sample for r in requests] == [0, 1]
    assert requests[0].seeds != requests[1].seeds
    assert bool(list(last.of_iteration(1))) == (blanks == 1)
    assert len(list(last.of_iteration(2))) == 2


def test_unstorable_characters_are_replaced() -> None:
    policy = FakePolicy(lambda r, s: sample_text("nul \x00 half \ud83d" if r.kind == "sample" else tagged("\x00")))
    last = finish(new_state(sample_size=1, max_iterations=1), policy)
    assert last.candidates[0].text == "nul \ufffd half ?"
    json.loads(last.model_dump_json())


def test_mismatched_reply_is_refused() -> None:
    state = new_state(sample_size=2)
    request = pending(state)
    assert request
    text = sample_text("text")
    rewards = Rewards(values=(1.0,), input_tokens=0, seconds=0)
    for count in (0, 1, 3):
        with pytest.raises(BadReplyError, match=f"returned {count} samples instead of 2"):
            apply(state, request, Generation(texts=(text,) * count, input_tokens=0, seconds=0))
    with pytest.raises(BadReplyError, match="Rewards is not a reply to Generate"):
        apply(state, request, rewards)
    sampled = step(state)
    request = pending(sampled)
    assert request
    with pytest.raises(BadReplyError, match="returned 1 scores for 2 responses"):
        apply(sampled, request, rewards)
    with pytest.raises(BadReplyError, match="Generation is not a reply to Score"):
        apply(sampled, request, Generation(texts=(text, text), input_tokens=0, seconds=0))
