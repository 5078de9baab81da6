"""The scripted back end: what its texts depend on, rising rewards, and the log of calls."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from testing.waiting import HANG_SECONDS
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core import prompts
from tpo.core.errors import CallInterruptedError
from tpo.core.ports import Generate, Score
from tpo.core.run import run
from tpo.core.state import Message, Params, State


def proceed() -> None:
    """Do not interrupt the call."""


def request(content: str = "Hello", **changes: Any) -> Generate:
    """Return a request for one sample, with changes."""
    values: dict[str, Any] = {
        "kind": "sample",
        "iteration": 0,
        "first_sample": 0,
        "messages": (Message(role="user", content=content),),
        "seeds": (1,),
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 100,
    }
    return Generate(**{**values, **changes})


def texts(generate: Generate) -> list[str]:
    """Return the samples of the scripted policy."""
    return [t.text for t in ScriptedPolicy().generate(generate, proceed).texts]


def run_job(prompt_set: str = "conversation", seed: int = 0, **params: Any) -> State:
    """Run a job to its end and return the last state."""
    state = State(
        input=(Message(role="user", content="How do tides work?"),),
        params=Params(seed=seed, **params),
        prompts=prompts.load(prompt_set),
    )
    return run(state, ScriptedPolicy(), ScriptedRewardModel(), lambda _: None, proceed)


def test_texts_depend_on_kind_messages_and_seed_only() -> None:
    same = request(iteration=3, first_sample=9, temperature=0.2, top_p=0.5, max_tokens=99)
    assert texts(request()) == texts(same)
    assert (
        len(
            {
                texts(r)[0]
                for r in (
                    request(),
                    request("Hi"),
                    request(seeds=(2,)),
                    request(kind="critique"),
                    request(kind="update"),
                )
            }
        )
        == 5
    )


@pytest.mark.processes
def test_texts_are_equal_in_every_process() -> None:
    code = "from tests.core.test_scripted import request, texts; print(texts(request())[0])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert found.stdout.strip() == texts(request())[0]


@pytest.mark.parametrize(
    ("prompt", "tags"),
    [
        ("Use <b>bold</b>. Put it between <improved_response> and </improved_response>.", "improved_response"),
        ("Put it between <improved> and </improved>.", "improved"),
        ("The demo's prompts name no tags.", "improved"),
    ],
)
def test_updates_answer_between_tags_of_prompt(prompt: str, tags: str) -> None:
    replies = texts(request(prompt, kind="update", seeds=tuple(range(400))))
    tagged = [r for r in replies if r.startswith(f"<{tags}> ") and r.endswith(f" </{tags}>")]
    assert all("<" not in r for r in replies if r not in tagged)
    assert 0.9 < len(tagged) / len(replies) < 0.99


@pytest.mark.parametrize("prompt_set", prompts.names())
@pytest.mark.parametrize("mode", ["tpo", "revision"])
def test_rewards_rise_with_shipped_prompt_sets(prompt_set: str, mode: str) -> None:
    jobs = [run_job(prompt_set, seed, mode=mode, max_iterations=3) for seed in range(5)]
    means = [[state.mean_reward(i) or 0.0 for i in range(4)] for state in jobs]
    curve = [sum(column) / len(column) for column in zip(*means, strict=True)]
    assert curve == sorted(curve)
    assert curve[3] > curve[0] + 1


def test_few_of_many_samples_are_unusable() -> None:
    candidates = [c for seed in range(20) for c in run_job(seed=seed).candidates]
    unusable = [c.unusable for c in candidates if c.unusable]
    assert set(unusable) == {"no_answer_tags"}
    assert len(unusable) < len(candidates) / 10


def test_overlong_text_is_cut_with_finish_reason_length() -> None:
    (text,) = ScriptedPolicy().generate(request(max_tokens=4), proceed).texts
    assert (len(text.text.split()), text.tokens, text.finish_reason) == (4, 4, "length")


def test_latency_is_applied_and_interruptible() -> None:
    started = time.monotonic()
    ScriptedPolicy(latency=0.1).generate(request(), proceed)
    assert time.monotonic() - started >= 0.1
    calls = 0

    def stop_later() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise CallInterruptedError("cancelled")

    started = time.monotonic()
    with pytest.raises(CallInterruptedError):
        ScriptedRewardModel(latency=3600).score(Score(iteration=0, messages=(), responses=("a",)), stop_later)
    assert time.monotonic() - started < 60


def test_log_has_one_line_per_started_call(tmp_path: Path) -> None:
    log = tmp_path / "calls"

    def stop() -> None:
        raise CallInterruptedError("drain")

    policy, reward = ScriptedPolicy(log=log), ScriptedRewardModel(log=log)
    policy.generate(request("a secret"), proceed)
    with pytest.raises(CallInterruptedError):
        policy.generate(request("a secret"), stop)
    policy.generate(request("a secret", seeds=(2,)), proceed)
    reward.score(Score(iteration=2, messages=(), responses=("a secret",)), proceed)
    lines = [line.split(" ") for line in log.read_text().splitlines()]
    assert [line[:2] for line in lines] == [["sample", "0"], ["sample", "0"], ["sample", "0"], ["score", "2"]]
    assert lines[0][2] == lines[1][2] != lines[2][2]
    assert {line[3] for line in lines} == {str(os.getpid())}
    assert "secret" not in log.read_text()


def test_reward_scores_any_text() -> None:
    odd = ("", "no draft", "\ud800 lone", "Draft 999999", "Draft 3: x")
    values = ScriptedRewardModel().score(Score(iteration=0, messages=(), responses=odd), proceed).values
    assert [int(v) for v in values] == [0, 0, 0, 999999, 3]
