"""The `openai` back end against a real server process that misbehaves."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from testing.processes import marker
from testing.waiting import HANG_SECONDS, eventually
from tests.contract.test_backends import ask, proceed
from tests.support.model_server import MODEL, ModelServer
from tpo.backends import load_policy
from tpo.backends.remote.policy import OpenAIPolicy
from tpo.backends.remote.server import Limits, Server
from tpo.core.errors import (
    BackendUnavailableError,
    BadReplyError,
    CallInterruptedError,
    ContextTooLongError,
    ModelRefusedError,
    PromptRefusedError,
)
from tpo.settings import Settings

QUOTA = {"type": "insufficient_quota", "code": "insufficient_quota"}
QUICK = Limits(connect=2, read=20, call=30, tries=4, pause=0.01, longest_pause=0.05)


def made(server: ModelServer, limits: Limits = QUICK, **changes: Any) -> OpenAIPolicy:
    settings = Settings(openai_url=server.url, **changes)
    key = settings.openai_api_key.get_secret_value() if settings.openai_api_key else None
    return OpenAIPolicy(MODEL, Server(server.url, key, limits), settings)


@pytest.fixture
def policy(server: ModelServer) -> Iterator[OpenAIPolicy]:
    policy = made(server)
    yield policy
    policy.close()


def texts(policy: OpenAIPolicy, **changes: Any) -> list[str]:
    return [t.text for t in policy.generate(ask(**changes), proceed).texts]


def test_one_request_for_all_samples(server: ModelServer, policy: OpenAIPolicy) -> None:
    reply = policy.generate(ask(seeds=(2**63 - 1, 5, 6), max_tokens=40), proceed)
    (seen,) = server.seen()
    assert len(reply.texts) == 3
    assert seen["key"] is None
    assert seen["body"] == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How do tides work?"}],
        "n": 3,
        "seed": 2**31 - 1,
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 40,
    }
    assert sum(t.tokens for t in reply.texts) == sum(len(t.text.split()) for t in reply.texts)


@pytest.mark.parametrize("always", [True, False], ids=["always", "once"])
def test_a_server_that_gives_one_choice_for_five_is_asked_for_the_rest(
    server: ModelServer, policy: OpenAIPolicy, always: bool
) -> None:
    server.control(*([] if always else [{"choices": 1}]), ignores_n=always)
    reply = policy.generate(ask(seeds=(1, 2, 3, 4, 5)), proceed)
    assert len({t.text for t in reply.texts}) == 5
    assert [s["body"].get("n", 1) for s in server.seen()] == [5, 1, 1, 1, 1]
    assert sorted(s["body"]["seed"] for s in server.seen()) == [1, 2, 3, 4, 5]
    apart = [text for seed in (1, 2, 3, 4, 5) for text in texts(policy, seeds=(seed,))]
    assert [t.text for t in reply.texts] == apart


def test_a_server_that_takes_no_such_n_is_asked_for_each(server: ModelServer, policy: OpenAIPolicy) -> None:
    seeds = (1, 2, 3, 4, 5)
    expected = [text for seed in seeds for text in texts(policy, seeds=(seed,))]
    server.control(slots=4)
    assert texts(policy, seeds=seeds) == expected
    assert [s["body"].get("n", 1) for s in server.seen()] == [5, 1, 1, 1, 1, 1]


def test_a_server_that_leaves_the_stop_string_in_the_text(server: ModelServer, policy: OpenAIPolicy) -> None:
    stop = (texts(policy)[0].split()[2],)
    expected = policy.generate(ask(stop=stop), proceed).texts
    server.control(keeps_stop=True)
    got = policy.generate(ask(stop=stop), proceed).texts
    assert [(t.text, t.finish_reason) for t in got] == [(t.text, t.finish_reason) for t in expected]


def test_a_server_that_gives_no_choice_is_a_bad_reply(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(*[{"choices": 0}] * 9)
    with pytest.raises(BadReplyError, match="without any response"):
        policy.generate(ask(), proceed)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429, "headers": {"retry-after": "0.01"}},
        {"status": 429},
        {"half": True},
        {"nothing": True},
        {"raw": "<html>Bad gateway</html>"},
        {"raw": '{"choices": "none"}'},
        {"raw": "[]"},
        {"raw": ""},
    ],
    ids=lambda f: next(iter(f)) + str(f.get("status", "")),
)
def test_what_may_pass_is_tried_again_and_changes_nothing(
    server: ModelServer, policy: OpenAIPolicy, fault: dict[str, Any]
) -> None:
    expected = texts(policy)
    server.control(fault, fault)
    assert texts(policy) == expected
    assert len(server.seen()) == 3


@pytest.mark.parametrize(
    ("fault", "error"),
    [({"status": 502}, BackendUnavailableError), ({"raw": "no JSON"}, BadReplyError)],
    ids=["502", "no JSON"],
)
def test_after_so_many_tries_it_is_given_up(
    server: ModelServer, policy: OpenAIPolicy, fault: dict[str, Any], error: type[Exception]
) -> None:
    server.control(*[fault] * 9)
    with pytest.raises(error, match=r"502|not JSON"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == QUICK.tries


def test_a_pause_that_is_asked_for_is_kept(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "headers": {"retry-after": "1"}})
    assert policy.generate(ask(), proceed).seconds >= 1


def test_a_pause_beyond_the_call_ends_it_at_once(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "headers": {"retry-after": "3600"}})
    with pytest.raises(BackendUnavailableError, match=r"429.*no further try fits"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (400, PromptRefusedError, r"refused the sample call \(400\): no"),
        (401, BackendUnavailableError, "refused the key .*TPO_OPENAI_API_KEY"),
        (404, BackendUnavailableError, "knows no such model"),
        (422, PromptRefusedError, "422"),
        (302, BackendUnavailableError, "sends elsewhere: TPO_OPENAI_URL"),
    ],
)
def test_what_is_refused_for_good_is_not_tried_again(
    server: ModelServer, policy: OpenAIPolicy, status: int, error: type[Exception], says: str
) -> None:
    server.control({"status": status})
    with pytest.raises(error, match=says):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


def test_a_used_up_quota_is_not_tried_again(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "body": {"error": {"message": "pay", **QUOTA}}})
    with pytest.raises(BackendUnavailableError, match="quota is used up"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


def test_a_try_that_hangs_is_ended_and_another_one_made(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = made(server, Limits(read=0.2, call=30, tries=3, pause=0.01))
    assert len(texts(policy)) == 3
    policy.close()
    assert len(server.seen()) == 2


def test_a_whole_call_has_a_limit(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = made(server, Limits(read=60, call=0.3, tries=3))
    with pytest.raises(BackendUnavailableError, match=r"did not answer in time; 0\.3 s are over"):
        policy.generate(ask(), proceed)
    policy.close()


def test_a_cancelled_call_leaves_the_server_at_once(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"hangs": True})
    cancelled = threading.Event()

    def interrupt() -> None:
        if cancelled.is_set():
            raise CallInterruptedError("cancelled")

    raised: list[BaseException] = []

    def generate() -> None:
        try:
            policy.generate(ask(), interrupt)
        except CallInterruptedError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    eventually(server.seen, why="the request")
    cancelled.set()
    thread.join(HANG_SECONDS)
    assert len(raised) == 1
    assert eventually(server.left, why="the end of the connection") == 1
    assert len(texts(policy)) == 3


def test_what_waits_ends_when_the_back_end_is_closed(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = made(server)
    raised: list[BaseException] = []

    def generate() -> None:
        try:
            policy.generate(ask(), proceed)
        except BackendUnavailableError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    eventually(server.seen, why="the request")
    policy.close()
    thread.join(HANG_SECONDS)
    assert len(raised) == 1
    with pytest.raises(BackendUnavailableError, match="closed"):
        policy.generate(ask(), proceed)


@pytest.mark.parametrize("how", ["field", "tags"])
def test_thinking_is_kept_apart(server: ModelServer, policy: OpenAIPolicy, how: str) -> None:
    plain = policy.generate(ask(max_tokens=60), proceed)
    server.control(thinking=how)
    reply = policy.generate(ask(max_tokens=60), proceed)
    assert [t.text for t in reply.texts] == [t.text for t in plain.texts]
    assert reply.reasoning_tokens > 0
    assert sum(t.tokens for t in reply.texts) + reply.reasoning_tokens == sum(t.tokens for t in plain.texts)


@pytest.mark.parametrize(("said", "means"), [("length", "length"), ("content_filter", "length"), ("stop", "stop")])
def test_how_an_answer_ended(server: ModelServer, policy: OpenAIPolicy, said: str, means: str) -> None:
    server.control(finish_reason=said)
    assert {t.finish_reason for t in policy.generate(ask(), proceed).texts} == {means}


def test_an_answer_that_the_server_broke_off_is_none(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(finish_reason="abort")
    with pytest.raises(BadReplyError):
        policy.generate(ask(), proceed)


def test_a_server_that_counts_nothing(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(counts_nothing=True)
    reply = policy.generate(ask(), proceed)
    assert reply.input_tokens > 0
    assert all(t.tokens > 0 for t in reply.texts)


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "no numbers"])
def test_a_limit_that_does_not_fit_is_lowered(server: ModelServer, policy: OpenAIPolicy, numbers: bool) -> None:
    server.control(window=40, says_no_numbers=not numbers)
    reply = policy.generate(ask(max_tokens=8192), proceed)
    assert len(reply.texts) == 3
    asked = [s["body"]["max_tokens"] for s in server.seen()]
    assert asked[-1] == 36 if numbers else 18 < asked[-1] <= 36
    assert (len(asked) == 2) == numbers


def test_a_server_that_lowers_limits_itself_gets_its_whole_window(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(window=40, lowers=True)
    assert len(policy.generate(ask(max_tokens=8192), proceed).texts) == 3
    assert [s["body"]["max_tokens"] for s in server.seen()] == [8192, 40]


def test_a_prompt_that_a_server_calls_too_long_by_itself_is_not_sent_again(
    server: ModelServer, policy: OpenAIPolicy
) -> None:
    server.control(window=10, lowers=True)
    with pytest.raises(ContextTooLongError, match=r"has more tokens than fit; the policy holds 10 with its answer"):
        policy.generate(ask("word " * 20, max_tokens=8), proceed)
    assert len(server.seen()) == 1


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "no numbers"])
def test_a_prompt_beyond_the_context(server: ModelServer, policy: OpenAIPolicy, numbers: bool) -> None:
    server.control(window=10, says_no_numbers=not numbers)
    with pytest.raises(ContextTooLongError, match=r"The prompt of the sample call has .*Shorten the conversation"):
        policy.generate(ask("word " * 20), proceed)


def test_text_that_is_no_unicode_is_refused_here(server: ModelServer, policy: OpenAIPolicy) -> None:
    with pytest.raises(PromptRefusedError, match="half a surrogate"):
        policy.generate(ask("\ud800"), proceed)
    assert server.seen() == []


@pytest.mark.processes
def test_a_server_that_is_away_is_waited_for_and_asked_by_one_at_a_time(server: ModelServer) -> None:
    away = ModelServer()
    policy = made(away, Limits(connect=2, call=60, tries=3, pause=0.02, longest_pause=0.2))
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(len(texts(policy)))) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: policy._server._breaker.is_open, why="an open circuit")
    away.start()
    try:
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert got == [3] * 12
        assert not policy._server._breaker.is_open
    finally:
        policy.close()
        away.kill()


def test_the_key_is_sent_and_told_to_nobody(
    server: ModelServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    key = marker()
    settings = Settings(policy=f"openai:{MODEL}", openai_url=server.url, openai_api_key=key)
    server.control(key=key)
    policy = load_policy(settings.policy, settings)
    with caplog.at_level("DEBUG"):
        assert len(policy.generate(ask(), proceed).texts) == 3
    policy.close()
    assert [s["key"] for s in server.seen()] == [f"Bearer {key}"]
    assert key not in caplog.text + repr(settings) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ("another", {}, f"has no model another. It has: {MODEL}"),
        (MODEL, {"openai_url": "http://127.0.0.1:1/v1"}, r"It was waited for 0\.3 s; is its address right"),
    ],
)
def test_a_start_says_what_is_wrong(server: ModelServer, model: str, changes: dict[str, Any], says: str) -> None:
    settings = Settings(**{"openai_url": server.url, "remote_start_seconds": 0.3, **changes})
    with pytest.raises(ModelRefusedError, match=says):
        load_policy(f"openai:{model}", settings)


def test_a_server_that_lists_no_models_is_taken_at_its_word(server: ModelServer) -> None:
    server.control(lists_no_models=True)
    policy = load_policy(f"openai:{MODEL}", Settings(openai_url=server.url))
    assert len(policy.generate(ask(), proceed).texts) == 3
    policy.close()


def test_more_is_added_to_each_request_and_the_limit_has_the_name_that_is_set(server: ModelServer) -> None:
    extra = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}, "min_p": 0.1}
    policy = made(server, openai_extra_body=extra, openai_max_tokens_field="max_completion_tokens")
    texts(policy)
    policy.close()
    (seen,) = server.seen()
    assert {name: seen["body"][name] for name in extra} == extra
    assert seen["body"]["max_completion_tokens"] == 24
    assert "max_tokens" not in seen["body"]
