"""The `openai` back end against a real server process with configurable faults."""

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
from tpo.backends.spec import ModelSpec
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


def make_policy(server: ModelServer, limits: Limits = QUICK, **changes: Any) -> OpenAIPolicy:
    spec = ModelSpec.from_settings(Settings(policy=f"openai:{MODEL}", openai_url=server.url, **changes))
    key = spec.api_key.get_secret_value() if spec.api_key else None
    return OpenAIPolicy(spec, Server(server.url, key, limits))


@pytest.fixture
def policy(server: ModelServer) -> Iterator[OpenAIPolicy]:
    policy = make_policy(server)
    yield policy
    policy.close()


def texts(policy: OpenAIPolicy, **changes: Any) -> list[str]:
    return [t.text for t in policy.generate(ask(**changes), proceed).texts]


def test_all_samples_are_in_one_request(server: ModelServer, policy: OpenAIPolicy) -> None:
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
def test_missing_choices_are_requested_separately(server: ModelServer, policy: OpenAIPolicy, always: bool) -> None:
    server.control(*([] if always else [{"choices": 1}]), ignores_n=always)
    reply = policy.generate(ask(seeds=(1, 2, 3, 4, 5)), proceed)
    assert len({t.text for t in reply.texts}) == 5
    assert [s["body"].get("n", 1) for s in server.seen()] == [5, 1, 1, 1, 1]
    assert sorted(s["body"]["seed"] for s in server.seen()) == [1, 2, 3, 4, 5]
    separate = [text for seed in (1, 2, 3, 4, 5) for text in texts(policy, seeds=(seed,))]
    assert [t.text for t in reply.texts] == separate


def test_rejected_n_falls_back_to_separate_requests(server: ModelServer, policy: OpenAIPolicy) -> None:
    seeds = (1, 2, 3, 4, 5)
    expected = [text for seed in seeds for text in texts(policy, seeds=(seed,))]
    server.control(slots=4)
    assert texts(policy, seeds=seeds) == expected
    assert [s["body"].get("n", 1) for s in server.seen()] == [5, 1, 1, 1, 1, 1]


def test_stop_string_left_in_the_text_is_removed(server: ModelServer, policy: OpenAIPolicy) -> None:
    stop = (texts(policy)[0].split()[2],)
    expected = policy.generate(ask(stop=stop), proceed).texts
    server.control(keeps_stop=True)
    texts_without_stop = policy.generate(ask(stop=stop), proceed).texts
    assert [(t.text, t.finish_reason) for t in texts_without_stop] == [(t.text, t.finish_reason) for t in expected]


def test_reply_without_choices_is_a_bad_reply(server: ModelServer, policy: OpenAIPolicy) -> None:
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
def test_temporary_fault_is_retried_with_the_same_result(
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
def test_call_fails_after_its_last_try(
    server: ModelServer, policy: OpenAIPolicy, fault: dict[str, Any], error: type[Exception]
) -> None:
    server.control(*[fault] * 9)
    with pytest.raises(error, match=r"502|not JSON"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == QUICK.tries


def test_retry_after_is_respected(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "headers": {"retry-after": "1"}})
    assert policy.generate(ask(), proceed).seconds >= 1


def test_retry_after_beyond_the_time_limit_ends_the_call(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "headers": {"retry-after": "3600"}})
    with pytest.raises(BackendUnavailableError, match=r"429.*no further try fits"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, PromptRefusedError, r"refused the sample call \(400\): no"),
        (401, BackendUnavailableError, "refused the key .*TPO_OPENAI_API_KEY"),
        (404, BackendUnavailableError, "has no such model"),
        (422, PromptRefusedError, "422"),
        (302, BackendUnavailableError, "redirects elsewhere: TPO_OPENAI_URL"),
    ],
)
def test_permanent_error_is_not_retried(
    server: ModelServer, policy: OpenAIPolicy, status: int, error: type[Exception], message: str
) -> None:
    server.control({"status": status})
    with pytest.raises(error, match=message):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


def test_exhausted_quota_is_not_retried(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control({"status": 429, "body": {"error": {"message": "pay", **QUOTA}}})
    with pytest.raises(BackendUnavailableError, match="quota is used up"):
        policy.generate(ask(), proceed)
    assert len(server.seen()) == 1


def test_hanging_try_times_out_and_is_retried(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = make_policy(server, Limits(read=0.2, call=30, tries=3, pause=0.01))
    assert len(texts(policy)) == 3
    policy.close()
    assert len(server.seen()) == 2


def test_whole_call_has_a_time_limit(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = make_policy(server, Limits(read=60, call=0.3, tries=3))
    with pytest.raises(BackendUnavailableError, match=r"did not answer in time; 0\.3 s are over"):
        policy.generate(ask(), proceed)
    policy.close()


def test_cancelled_call_closes_its_connection(server: ModelServer, policy: OpenAIPolicy) -> None:
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
    eventually(server.seen, why="the server should receive the request")
    cancelled.set()
    thread.join(HANG_SECONDS)
    assert len(raised) == 1
    assert eventually(server.left, why="the connection should be closed") == 1
    assert len(texts(policy)) == 3


def test_close_ends_waiting_calls(server: ModelServer) -> None:
    server.control({"hangs": True})
    policy = make_policy(server)
    raised: list[BaseException] = []

    def generate() -> None:
        try:
            policy.generate(ask(), proceed)
        except BackendUnavailableError as error:
            raised.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    eventually(server.seen, why="the server should receive the request")
    policy.close()
    thread.join(HANG_SECONDS)
    assert len(raised) == 1
    with pytest.raises(BackendUnavailableError, match="closed"):
        policy.generate(ask(), proceed)


@pytest.mark.parametrize("how", ["field", "tags"])
def test_reasoning_is_separated_and_counted(server: ModelServer, policy: OpenAIPolicy, how: str) -> None:
    plain = policy.generate(ask(max_tokens=60), proceed)
    server.control(thinking=how)
    reply = policy.generate(ask(max_tokens=60), proceed)
    assert [t.text for t in reply.texts] == [t.text for t in plain.texts]
    assert reply.reasoning_tokens > 0
    assert sum(t.tokens for t in reply.texts) + reply.reasoning_tokens == sum(t.tokens for t in plain.texts)


@pytest.mark.parametrize(
    ("reported", "expected"), [("length", "length"), ("content_filter", "length"), ("stop", "stop")]
)
def test_finish_reason_is_mapped(server: ModelServer, policy: OpenAIPolicy, reported: str, expected: str) -> None:
    server.control(finish_reason=reported)
    assert {t.finish_reason for t in policy.generate(ask(), proceed).texts} == {expected}


def test_aborted_choice_is_a_bad_reply(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(finish_reason="abort")
    with pytest.raises(BadReplyError):
        policy.generate(ask(), proceed)


def test_missing_usage_is_estimated(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(counts_nothing=True)
    reply = policy.generate(ask(), proceed)
    assert reply.input_tokens > 0
    assert all(t.tokens > 0 for t in reply.texts)


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "no numbers"])
def test_max_tokens_beyond_the_window_is_lowered(server: ModelServer, policy: OpenAIPolicy, numbers: bool) -> None:
    server.control(window=40, says_no_numbers=not numbers)
    reply = policy.generate(ask(max_tokens=8192), proceed)
    assert len(reply.texts) == 3
    limits = [s["body"]["max_tokens"] for s in server.seen()]
    assert limits[-1] == 36 if numbers else 18 < limits[-1] <= 36
    assert (len(limits) == 2) == numbers


def test_server_that_lowers_limits_gets_its_whole_window(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(window=40, lowers=True)
    assert len(policy.generate(ask(max_tokens=8192), proceed).texts) == 3
    assert [s["body"]["max_tokens"] for s in server.seen()] == [8192, 40]


def test_prompt_the_server_calls_too_long_is_not_resent(server: ModelServer, policy: OpenAIPolicy) -> None:
    server.control(window=10, lowers=True)
    with pytest.raises(ContextTooLongError, match=r"has more tokens than fit; the policy holds 10 with its answer"):
        policy.generate(ask("word " * 20, max_tokens=8), proceed)
    assert len(server.seen()) == 1


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "no numbers"])
def test_prompt_beyond_the_context_is_rejected(server: ModelServer, policy: OpenAIPolicy, numbers: bool) -> None:
    server.control(window=10, says_no_numbers=not numbers)
    with pytest.raises(ContextTooLongError, match=r"The prompt of the sample call has .*Shorten the conversation"):
        policy.generate(ask("word " * 20), proceed)


def test_lone_surrogate_is_rejected_without_a_request(server: ModelServer, policy: OpenAIPolicy) -> None:
    with pytest.raises(PromptRefusedError, match="half a surrogate"):
        policy.generate(ask("\ud800"), proceed)
    assert server.seen() == []


@pytest.mark.processes
def test_circuit_breaker_waits_for_an_unreachable_server(server: ModelServer) -> None:
    down = ModelServer()
    policy = make_policy(down, Limits(connect=2, call=60, tries=3, pause=0.02, longest_pause=0.2))
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(len(texts(policy)))) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: policy._server._breaker.is_open, why="the circuit should open")
    down.start()
    try:
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert counts == [3] * 12
        assert not policy._server._breaker.is_open
    finally:
        policy.close()
        down.kill()


def test_key_is_sent_and_never_logged(
    server: ModelServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    key = marker()
    settings = Settings(policy=f"openai:{MODEL}", openai_url=server.url, openai_api_key=key)
    server.control(key=key)
    policy = load_policy(ModelSpec.from_settings(settings), settings)
    with caplog.at_level("DEBUG"):
        assert len(policy.generate(ask(), proceed).texts) == 3
    policy.close()
    assert [s["key"] for s in server.seen()] == [f"Bearer {key}"]
    assert key not in caplog.text + repr(settings) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("another", {}, f"has no model another. It has: {MODEL}"),
        (MODEL, {"openai_url": "http://127.0.0.1:1/v1"}, r"TPO waited 0\.3 s for it\. Check its address"),
    ],
)
def test_load_reports_an_unusable_server(
    server: ModelServer, model: str, changes: dict[str, Any], message: str
) -> None:
    settings = Settings(
        **{"policy": f"openai:{model}", "openai_url": server.url, "remote_start_seconds": 0.3, **changes}
    )
    with pytest.raises(ModelRefusedError, match=message):
        load_policy(ModelSpec.from_settings(settings), settings)


def test_server_without_a_model_list_is_accepted(server: ModelServer) -> None:
    server.control(lists_no_models=True)
    policy = load_policy(ModelSpec(f"openai:{MODEL}", server.url), Settings())
    assert len(policy.generate(ask(), proceed).texts) == 3
    policy.close()


def test_extra_body_and_max_tokens_field_are_sent(server: ModelServer) -> None:
    extra = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}, "min_p": 0.1}
    policy = make_policy(server, openai_extra_body=extra, openai_max_tokens_field="max_completion_tokens")
    texts(policy)
    policy.close()
    (seen,) = server.seen()
    assert {name: seen["body"][name] for name in extra} == extra
    assert seen["body"]["max_completion_tokens"] == 24
    assert "max_tokens" not in seen["body"]
