"""Reward models over HTTP: raw scores, also from servers that apply a sigmoid by default."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_backends import proceed, rate
from tests.integration.remote.test_policy import QUICK
from tests.support.model_server import MODEL, ModelServer
from tests.support.tiny_models import BOS, END, TURN, make_tokenizer
from tpo.backends import LoadedRewardModel, load_reward
from tpo.backends.remote import reward as remote
from tpo.backends.remote.apis import VllmClassify
from tpo.backends.remote.reward import IN_UNIT_INTERVAL_IN_A_ROW, PROBES, RemoteRewardModel
from tpo.backends.remote.server import Server
from tpo.core.errors import BackendUnavailableError, ContextTooLongError, ModelRefusedError
from tpo.settings import Settings

KINDS = ["vllm", "vllm-pooling", "sglang"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(server: ModelServer, kind: str = "vllm", **changes: Any) -> LoadedRewardModel:
    return load_reward(
        Settings(**{"reward_model": f"{kind}:{MODEL}", "reward_url": server.root, "remote_tries": 3, **changes})
    )


@pytest.fixture
def quick(server: ModelServer) -> Iterator[RemoteRewardModel]:
    reward = RemoteRewardModel(MODEL, Server(server.root, None, QUICK), VllmClassify(), bounded=False)
    yield reward
    reward.close()


@pytest.mark.parametrize(("kind", "path"), [("vllm", "/classify"), ("vllm-pooling", "/pooling")])
def test_vllm_scores_whole_conversations_without_sigmoid(server: ModelServer, kind: str, path: str) -> None:
    server.control(sigmoid=True)
    reward = load(server, kind)
    server.control(sigmoid=True)
    rewards = reward.score(rate("Draft 9: wet.", "Draft 7: dry."), proceed)
    assert 7 <= rewards.values[0] < 8
    assert 5 <= rewards.values[1] < 6
    assert rewards.parts == ()
    reward.close()
    seen = sorted(server.seen(), key=lambda s: s["body"]["messages"][1]["content"])
    assert [s["path"] for s in seen] == [path, path]
    assert seen[1]["body"]["messages"] == [
        {"role": "user", "content": "How do tides work?"},
        {"role": "assistant", "content": "Draft 9: wet."},
    ]
    assert all(s["body"]["use_activation"] is False for s in seen)


def test_token_classifier_score_is_that_of_the_last_token(server: ModelServer) -> None:
    reward = load(server, "vllm-pooling", reward_task="token_classify")
    assert 7 <= reward.score(rate("Draft 9: wet."), proceed).values[0] < 8
    reward.close()


def test_sglang_gets_template_tokens_with_one_bos(server: ModelServer, tokenizer: str) -> None:
    reward = load(server, "sglang", reward_tokenizer=tokenizer)
    server.control()
    rewards = reward.score(rate(f"It is {TURN} the moon."), proceed)
    (seen,) = server.seen()
    ids = seen["body"]["input_ids"]
    text = str(make_tokenizer().decode(ids))
    assert text.count(BOS) == 1
    assert text.startswith(f"{BOS}{TURN}user: How do tides work?{END}{TURN}assistant: ")
    turn = make_tokenizer().convert_tokens_to_ids(TURN)
    assert ids.count(turn) == 2  # those of the template, none from the response
    assert rewards.values == (sum(ids) % 97 / 10 - 4,)
    assert rewards.input_tokens == len(ids)
    reward.close()


@pytest.mark.parametrize("kind", ["vllm", "vllm-pooling"])
def test_server_that_always_applies_a_sigmoid_is_rejected(server: ModelServer, kind: str) -> None:
    server.control(sigmoid="always")
    with pytest.raises(ModelRefusedError, match=r"sigmoid, .*use_activation.*TPO_REWARD_IN_UNIT_INTERVAL=true"):
        load(server, kind)
    reward = load(server, kind, reward_in_unit_interval=True)
    assert 0 < reward.score(rate("Draft 3: so."), proceed).values[0] < 1
    reward.close()


def test_later_sigmoid_makes_the_model_unhealthy(server: ModelServer, quick: RemoteRewardModel) -> None:
    responses = [f"Draft {i}: so." for i in range(32)]
    server.control(sigmoid="always")
    for _ in range(IN_UNIT_INTERVAL_IN_A_ROW // len(responses) - 1):
        quick.score(rate(*responses), proceed)
        assert quick.healthy
    with pytest.raises(BackendUnavailableError, match="sigmoid"):
        quick.score(rate(*responses), proceed)
    assert not quick.healthy


def test_model_with_several_labels_is_rejected(server: ModelServer) -> None:
    server.control(labels=2)
    with pytest.raises(ModelRefusedError, match=r"gives 2 numbers for a response.*one label"):
        load(server)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 422, "body": {"detail": "input: field required"}}, r"does not score over /classify \(422\): input"),
        ({"raw": '{"data": []}'}, "not with a classification"),
    ],
    ids=["an old vLLM", "something else"],
)
def test_server_that_does_not_score_is_rejected_at_load(
    server: ModelServer, fault: dict[str, Any], message: str
) -> None:
    server.control(*[fault] * 3 * len(PROBES))
    with pytest.raises(ModelRefusedError, match=message):
        load(server)


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"half": True}, {"nothing": True}, {"raw": "{}"}], ids=lambda f: next(iter(f))
)
def test_temporary_fault_is_retried(server: ModelServer, quick: RemoteRewardModel, fault: dict[str, Any]) -> None:
    expected = quick.score(rate("a", "b", "c"), proceed).values
    server.control(fault, fault)
    assert quick.score(rate("a", "b", "c"), proceed).values == expected
    assert len(server.seen()) == 5


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "no numbers"])
def test_long_response_is_truncated_and_reports_its_share(
    server: ModelServer, quick: RemoteRewardModel, numbers: bool
) -> None:
    server.control(window=30, says_no_numbers=not numbers)
    rewards = quick.score(rate("Draft 5: " + "word " * 60, "Draft 4: short."), proceed)
    assert 3 <= rewards.values[0] < 4
    (reward, share), (_, whole) = rewards.parts
    assert (reward.name, reward.value, reward.weight) == ("reward", rewards.values[0], 1.0)
    assert (share.name, share.weight, whole.value) == ("share_read", 0.0, 1.0)
    assert share.value is not None
    assert 0.15 < share.value < 0.5
    kept = [s["body"]["messages"][-1]["content"] for s in server.seen()]
    assert all(("Draft 5: " + "word " * 60).startswith(text) or text == "Draft 4: short." for text in kept)


def test_truncation_without_token_counts_fills_the_window(server: ModelServer, quick: RemoteRewardModel) -> None:
    server.control(window=30, lowers=True)
    ((_, share),) = quick.score(rate("Draft 5: " + "word " * 60), proceed).parts
    # A window of 30 words holds 26 of its 62 words. Only halving would stop at a quarter.
    assert share.value is not None
    assert 0.35 < share.value < 0.42


def test_listed_window_truncates_token_requests(server: ModelServer, tokenizer: str) -> None:
    server.control(lists_window=200)
    reward = load(server, "sglang", reward_tokenizer=tokenizer, reward_in_unit_interval=True)
    server.control()
    rewards = reward.score(rate("x" * 500), proceed)
    assert rewards.parts[0][1].value is not None
    (seen,) = server.seen()
    assert 100 < len(seen["body"]["input_ids"]) <= 200
    reward.close()


def test_conversation_without_space_for_a_response_fails(server: ModelServer, quick: RemoteRewardModel) -> None:
    server.control(window=2)
    with pytest.raises(ContextTooLongError, match=r"no room for a response .*\(2 tokens\)"):
        quick.score(rate("word " * 60), proceed)


def test_missing_url_or_tokenizer_is_reported(server: ModelServer, tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="TPO_REWARD_URL"):
        load_reward(Settings(reward_model=f"vllm:{MODEL}"))
    with pytest.raises(ModelRefusedError, match="TPO_REWARD_TOKENIZER"):
        load(server, "sglang", reward_tokenizer=str(tmp_path))


def test_probes_are_distinct_and_sufficient() -> None:
    assert len(set(PROBES)) == len(PROBES) >= 6
    assert remote.IN_UNIT_INTERVAL_IN_A_ROW >= 64
