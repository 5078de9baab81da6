"""Conformance of every policy and every reward model to the ports."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from testing.waiting import HANG_SECONDS
from tests.support.model_server import MODEL, ModelServer, model_server
from tests.support.tiny_models import make_tokenizer, save_llama, save_reward
from tpo.backends import LoadedPolicy, LoadedRewardModel, load_policy, load_reward
from tpo.backends.spec import ModelSpec
from tpo.core import prompts
from tpo.core.errors import CallInterruptedError
from tpo.core.ports import Generate, Score, cut_at
from tpo.core.run import run
from tpo.core.state import Message, Params, State
from tpo.settings import Settings

pytestmark = pytest.mark.processes

BACKENDS = ["scripted", "local", "openai"]
REWARDS = ["scripted", "local", "vllm", "vllm-pooling", "sglang", "combined"]


COMBINED = """
[[part]]
name = "quality"
kind = "model"
model = "scripted"

[[part]]
name = "short"
kind = "length"
most = 5
weight = 0.5
"""


def proceed() -> None:
    """Do not interrupt the call."""


def ask(text: str = "How do tides work?", **changes: Any) -> Generate:
    """Return a request for samples, with changes."""
    values: dict[str, Any] = {
        "kind": "sample",
        "iteration": 0,
        "first_sample": 0,
        "messages": (Message(role="user", content=text),),
        "seeds": (11, 12, 13),
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 24,
    }
    return Generate(**{**values, **changes})


def rate(*responses: str) -> Score:
    """Return a request to score these texts."""
    return Score(iteration=0, messages=(Message(role="user", content="How do tides work?"),), responses=responses)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    """Yield a fake model server."""
    with model_server() as server:
        yield server


@pytest.fixture(scope="module", params=BACKENDS)
def policy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: ModelServer
) -> Iterator[LoadedPolicy]:
    """Yield a policy of each back end."""
    spec = ModelSpec("scripted")
    if request.param == "local":
        spec = ModelSpec(str(save_llama(tmp_path_factory.mktemp("policy"))))
    elif request.param == "openai":
        spec = ModelSpec(f"openai:{MODEL}", server.url, samples="separate")
    policy = load_policy(spec, Settings(threads=1))
    yield policy
    policy.close()


@pytest.fixture(scope="module", params=REWARDS)
def reward(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: ModelServer
) -> Iterator[LoadedRewardModel]:
    """Yield a reward model of each back end."""
    folder = tmp_path_factory.mktemp("reward")
    settings: dict[str, Any] = {"reward_model": "scripted"}
    match request.param:
        case "local":
            settings = {"reward_model": str(save_reward(folder))}
        case "vllm" | "vllm-pooling" | "sglang":
            make_tokenizer().save_pretrained(folder)
            settings = {
                "reward_model": f"{request.param}:{MODEL}",
                "reward_url": server.root,
                "reward_tokenizer": str(folder),
            }
        case "combined":
            (folder / "reward.toml").write_text(COMBINED)
            settings = {"reward_model": "quality", "reward_file": str(folder / "reward.toml")}
    reward = load_reward(Settings(threads=1, **settings))
    yield reward
    reward.close()


def test_policy_cuts_sample_before_stop_string(policy: LoadedPolicy) -> None:
    whole = policy.generate(ask(), proceed).texts
    middle = len(whole[0].text) // 2
    stop = ("never sampled", whole[0].text[middle - 2 : middle + 2])
    cut = policy.generate(ask(stop=stop), proceed).texts
    assert [t.text for t in cut] == [cut_at(t.text, stop) for t in whole]
    assert cut[0].text != whole[0].text
    assert cut[0].finish_reason == "stop"
    assert cut[0].tokens < whole[0].tokens


def test_policy_gives_one_text_per_seed(policy: LoadedPolicy) -> None:
    for n in (1, 2, 7):
        assert len(policy.generate(ask(seeds=tuple(range(n))), proceed).texts) == n


def test_policy_repeats_text_for_same_seed(policy: LoadedPolicy) -> None:
    first, second = (policy.generate(ask(), proceed).texts for _ in range(2))
    assert first == second


def test_policy_text_depends_on_seed_not_on_batch(policy: LoadedPolicy) -> None:
    batch = policy.generate(ask(seeds=(5, 6, 7)), proceed).texts
    assert batch == tuple(policy.generate(ask(seeds=(seed,)), proceed).texts[0] for seed in (5, 6, 7))


def test_policy_gives_different_texts_for_seeds(policy: LoadedPolicy) -> None:
    assert len({t.text for t in policy.generate(ask(seeds=tuple(range(8))), proceed).texts}) > 4


def test_policy_accepts_large_seeds(policy: LoadedPolicy) -> None:
    assert len(policy.generate(ask(seeds=(0, 2**63 - 1)), proceed).texts) == 2


def test_policy_ignores_seed_at_temperature_zero(policy: LoadedPolicy) -> None:
    assert len({t.text for t in policy.generate(ask(temperature=0.0, seeds=(1, 2, 3)), proceed).texts}) == 1


def test_policy_text_depends_on_message(policy: LoadedPolicy) -> None:
    assert policy.generate(ask("One thing."), proceed).texts != policy.generate(ask("Another thing."), proceed).texts


def test_policy_counts_and_limits_tokens(policy: LoadedPolicy) -> None:
    reply = policy.generate(ask(max_tokens=3), proceed)
    assert reply.input_tokens > 3
    assert reply.seconds >= 0
    assert all(1 <= t.tokens <= 3 for t in reply.texts)
    assert any(t.finish_reason == "length" and t.tokens == 3 for t in reply.texts)


def test_policy_counts_prompt_once_for_all_samples(policy: LoadedPolicy) -> None:
    counts = {policy.generate(ask(seeds=tuple(range(n))), proceed).input_tokens for n in (1, 4)}
    assert len(counts) == 1


def test_models_raise_interrupt_to_caller(policy: LoadedPolicy, reward: LoadedRewardModel) -> None:
    def stop() -> None:
        raise CallInterruptedError("cancelled")

    with pytest.raises(CallInterruptedError):
        policy.generate(ask(), stop)
    with pytest.raises(CallInterruptedError):
        reward.score(rate("It rains."), stop)
    assert len(policy.generate(ask(), proceed).texts) == 3
    assert len(reward.score(rate("It rains."), proceed).values) == 1


def test_policy_gives_same_texts_to_many_threads(policy: LoadedPolicy) -> None:
    requests = [ask(f"Question {i}", seeds=tuple(range(i, i + 1 + i % 3)), max_tokens=4 + i) for i in range(12)]
    separate = [policy.generate(request, proceed).texts for request in requests]
    concurrent: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, r=r: concurrent.update({i: policy.generate(r, proceed).texts}))
        for i, r in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert [concurrent[i] for i in range(len(requests))] == separate


def test_reward_gives_one_score_per_response(reward: LoadedRewardModel) -> None:
    for responses in (("a",), ("a", "b b", "c c c")):
        scores = reward.score(rate(*responses), proceed)
        assert len(scores.values) == len(responses)
        assert scores.input_tokens > 0


def test_reward_score_does_not_depend_on_batch(reward: LoadedRewardModel) -> None:
    responses = ("Short.", "A response that is somewhat longer than the others.", "Middling, it is.")
    batch = reward.score(rate(*responses), proceed).values
    separate = [reward.score(rate(response), proceed).values[0] for response in responses]
    assert batch == pytest.approx(separate, abs=1e-4)
    assert len(set(batch)) == 3


def test_run_repeats_with_any_reward_model(reward: LoadedRewardModel) -> None:
    state = State(
        input=(Message(role="user", content="Tides?"),), params=Params(), prompts=prompts.load("conversation")
    )
    policies = [load_policy(ModelSpec("scripted"), Settings()) for _ in range(2)]
    results = [run(state, policy, reward, lambda _: None, proceed) for policy in policies]
    assert results[0].candidates == results[1].candidates
    assert len(results[0].candidates) == 15


def test_models_are_healthy_while_open(policy: LoadedPolicy, reward: LoadedRewardModel) -> None:
    assert policy.healthy
    assert reward.healthy


def test_scripted_models_import_no_torch() -> None:
    code = (
        "import sys; from tpo.backends import load_models; from tpo.settings import Settings;"
        "load_models(Settings(policy='scripted', reward_model='scripted'));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_SECONDS)


def test_policy_reports_seconds_of_call(policy: LoadedPolicy) -> None:
    started = time.perf_counter()
    seconds = policy.generate(ask(), proceed).seconds
    assert seconds <= time.perf_counter() - started + 1e-3
