"""Responses of model servers: context-length refusals, retry pauses and chat completions; and the circuit breaker."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from tpo.backends.reasoning import split_reasoning
from tpo.backends.remote.apis import VllmClassify
from tpo.backends.remote.breaker import FAILURES, Breaker, ServerDownError
from tpo.backends.remote.context import TooLong, too_long
from tpo.backends.remote.reply import read_completion
from tpo.backends.remote.reward import IN_UNIT_INTERVAL_IN_A_ROW, RemoteRewardModel
from tpo.backends.remote.server import Malformed, Refused, retry_after
from tpo.core.errors import BackendUnavailableError, ModelRefusedError
from tpo.core.ports import Score


@pytest.mark.parametrize(
    ("message", "code", "expected"),
    [
        (
            (
                "This model's maximum context length is 4096 tokens and your request has 3000 input tokens (8192 > "
                "4096 - 3000). 'max_tokens' or 'max_completion_tokens' is too large: 8192."
            ),
            "BadRequestError",
            TooLong(4096, 3000),
        ),
        (
            (
                "This model's maximum context length is 128000 tokens. However, you requested 65535 output tokens and "
                "your prompt contains at least 62466 input tokens, for a total of at least 128001 tokens."
            ),
            "",
            TooLong(128000, None),
        ),
        (
            (
                "This model's maximum context length is 4096 tokens. However, you requested 4118 tokens (3118 in the "
                "messages, 1000 in the completion). Please reduce the length of the messages or completion."
            ),
            "context_length_exceeded",
            TooLong(4096, 3118),
        ),
        (
            "This model's maximum context length is 4097 tokens. However, your messages resulted in 33986 tokens.",
            "context_length_exceeded",
            TooLong(4097, 33986),
        ),
        (
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
            "",
            TooLong(4096, 5000),
        ),
        (
            (
                "Requested token count exceeds the model's maximum context length of 8192 tokens. You requested a "
                "total of 9000 tokens: 808 tokens from the input messages and 8192 tokens for the completion."
            ),
            "",
            TooLong(8192, 808),
        ),
        ("The input (9000 tokens) is longer than the model's context length (8192 tokens).", "", TooLong(8192, 9000)),
        (
            (
                "the request exceeds the available context size. try increasing the context size n_ctx: 256 "
                "n_prompt_tokens: 1407"
            ),
            "exceed_context_size_error",
            TooLong(256, 1407),
        ),
        ("max_tokens must be at least 1, got -186.", "BadRequestError", TooLong(None, None)),
        (
            "max_tokens=8192 cannot be greater than max_model_len=512. Please request fewer output tokens.",
            "BadRequestError",
            TooLong(512, None),
        ),
        (
            (
                "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input "
                "tokens, which exceeds this limit even without any output tokens."
            ),
            "BadRequestError",
            TooLong(512, None, prompt_only=True),
        ),
        (
            "max_completion_tokens is too large: 8192.This model supports at most 512 completion tokens.",
            "",
            TooLong(512, None),
        ),
        (
            "request (806 tokens) exceeds the available context size (512 tokens) n_ctx: 512 n_prompt_tokens: 806",
            "exceed_context_size_error",
            TooLong(512, 806),
        ),
        ("Your text is too rude.", "", None),
        ("top_p must be in (0, 1], got 0.", "BadRequestError", None),
    ],
)
def test_too_long_reads_server_messages(message: str, code: str, expected: TooLong | None) -> None:
    assert too_long(Refused(400, message, code)) == expected


def test_too_long_ignores_other_statuses() -> None:
    assert too_long(Refused(401, "maximum context length is 5", "")) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "1e"}, None),
    ],
)
def test_retry_after_reads_headers(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(httpx.Headers(headers)) == seconds


def test_retry_after_reads_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after(httpx.Headers({"retry-after": date})) == pytest.approx(90, abs=30)


@pytest.mark.parametrize(
    ("content", "answer", "reasoning"),
    [
        ("Plain.", "Plain.", ""),
        ("<think>Hm.</think>\n\nSo.", "So.", "<think>Hm."),
        ("Hm.</think>So.", "So.", "Hm."),
        ("<think>Hm.", "", "<think>Hm."),
        ("Tags: <think> and </think>.", "Tags: <think> and </think>.", ""),
        ("", "", ""),
    ],
)
def test_split_reasoning_separates_thinking(content: str, answer: str, reasoning: str) -> None:
    assert split_reasoning(content) == (answer, reasoning)


def completion(*contents: str | None, usage: Any = None, **message: Any) -> dict[str, Any]:
    """Return the body of a chat completion with one choice for each content."""
    choices = [{"message": {"content": c, **message}, "finish_reason": "stop"} for c in contents]
    return {"choices": choices, "usage": usage}


def test_completion_tokens_add_up_to_server_count() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 17, "completion_tokens_details": {"reasoning_tokens": 6}}
    reply = read_completion(completion("a" * 10, "b" * 33, "", usage=usage, reasoning_content="why " * 9))
    assert sum(t.tokens for t in reply.texts) == 11
    assert reply.reasoning_tokens == 6
    assert reply.texts[1].tokens > reply.texts[0].tokens > reply.texts[2].tokens == 0
    single = read_completion(completion("four", usage={"prompt_tokens": 5, "completion_tokens": 17}))
    assert single.texts[0].tokens == 17


@pytest.mark.parametrize(("reasoning", "answer"), [(2990, 10), (3001, 0), (0, 3000)])
def test_completion_excludes_hidden_reasoning_tokens(reasoning: int, answer: int) -> None:
    details = {"reasoning_tokens": reasoning}
    usage = {"prompt_tokens": 5, "completion_tokens": 3000, "completion_tokens_details": details}
    reply = read_completion(completion("a" * 40, "", usage=usage))
    assert ([t.tokens for t in reply.texts], reply.reasoning_tokens) == ([answer, 0], 3000 - answer)


def test_completion_ignores_aborted_choice_in_token_count() -> None:
    body = completion("a" * 40, "b" * 400, usage={"prompt_tokens": 5, "completion_tokens": 110})
    body["choices"][1]["finish_reason"] = "abort"
    assert [t.tokens for t in read_completion(body).texts] == [10]


def test_completion_joins_parts_and_accepts_empty_content() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    reply = read_completion({"choices": [{"message": {"content": parts}}, {"message": {"content": None}}]})
    assert [(t.text, t.finish_reason) for t in reply.texts] == [("one two", "stop"), ("", "stop")]
    assert reply.input_tokens is None


@pytest.mark.parametrize("body", [None, [], {}, {"choices": [{}]}, {"choices": [{"message": {"content": 5}}]}])
def test_read_completion_refuses_malformed_body(body: Any) -> None:
    with pytest.raises(Malformed, match="not with a chat completion"):
        read_completion(body)


def test_open_breaker_admits_one_request_at_a_time() -> None:
    async def run() -> tuple[int, int]:
        breaker = Breaker(0.01, 0.02)
        up = asyncio.Event()
        inside, most, requests = 0, 0, 0

        async def send() -> None:
            nonlocal inside, most, requests
            while True:
                try:
                    async with breaker.permit():
                        inside, requests = inside + 1, requests + 1
                        most = max(most, inside if breaker.is_open else 0)
                        try:
                            await asyncio.sleep(0.001)
                            if not up.is_set():
                                raise ServerDownError
                        finally:
                            inside -= 1
                        return
                except ServerDownError:
                    if requests > 5 * FAILURES:
                        up.set()

        async with asyncio.timeout(30):
            for _ in range(FAILURES):
                with pytest.raises(ServerDownError):
                    async with breaker.permit():
                        raise ServerDownError
            assert breaker.is_open
            await asyncio.gather(*(send() for _ in range(20)))
        assert not breaker.is_open
        return most, requests

    most, requests = asyncio.run(run())
    assert most == 1
    assert requests > 5 * FAILURES + 1


async def one_fails(breaker: Breaker) -> None:
    """Fail one request through the breaker."""
    async with breaker.permit():
        await asyncio.sleep(0)  # with several requests, all are sent before the first one fails
        raise ServerDownError


async def all_fail(breaker: Breaker, requests: int) -> None:
    """Fail this number of concurrent requests."""
    failed = await asyncio.gather(*(one_fails(breaker) for _ in range(requests)), return_exceptions=True)
    assert all(isinstance(error, ServerDownError) for error in failed)


def test_breaker_pause_grows_per_probe_and_resets() -> None:
    async def run() -> None:
        breaker = Breaker(0.01, 64.0)
        await all_fail(breaker, 3 * FAILURES)
        assert (breaker.is_open, breaker._pause) == (True, 0.02)
        await all_fail(breaker, 1)
        assert (breaker.is_open, breaker._pause) == (True, 0.04)
        async with breaker.permit():
            pass
        assert (breaker.is_open, breaker._pause) == (False, 0.01)

    asyncio.run(run())


async def pass_through(breaker: Breaker, begun: asyncio.Event, end: asyncio.Event, error: Exception | None) -> None:
    """Hold a request through the breaker until `end`, then raise the error if there is one."""
    async with breaker.permit():
        begun.set()
        await end.wait()
        if error:
            raise error


@pytest.mark.parametrize("was_open", [True, False], ids=["probe_fails", "earlier_request_succeeds"])
def test_breaker_admits_waiting_request_as_soon_as(was_open: bool) -> None:
    async def run() -> None:
        breaker = Breaker(0.01 if was_open else 3600.0, 3600.0)
        begun, end, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        done.set()
        if was_open:
            await all_fail(breaker, FAILURES)
        first = asyncio.create_task(pass_through(breaker, begun, end, ServerDownError() if was_open else None))
        await begun.wait()
        if not was_open:
            await all_fail(breaker, FAILURES)
        waits = asyncio.create_task(pass_through(breaker, asyncio.Event(), done, None))
        await asyncio.sleep(0)
        assert breaker.is_open
        end.set()
        await asyncio.gather(first, return_exceptions=True)
        async with asyncio.timeout(30):
            await waits

    asyncio.run(run())


def test_breaker_closes_on_refusal_but_not_on_cancellation() -> None:
    async def run() -> None:
        breaker = Breaker(0.0, 0.0)
        for _ in range(FAILURES):
            with pytest.raises(ServerDownError):
                async with breaker.permit():
                    raise ServerDownError
        with pytest.raises(asyncio.CancelledError):
            async with breaker.permit():
                raise asyncio.CancelledError
        assert breaker.is_open
        with pytest.raises(Refused):
            async with breaker.permit():
                raise Refused(400, "no", "")
        assert not breaker.is_open

    asyncio.run(run())


class Refusing:
    """A server whose model has been replaced by another one."""

    def call(self, work: Any, _interrupt: Any) -> Any:
        work.close()
        raise ModelRefusedError("The reward model's server gives 2 numbers for a response.")


def test_sigmoid_watch_restarts_after_score_outside_range() -> None:
    server: Any = Refusing()
    reward = RemoteRewardModel("m", server, VllmClassify(), bounded=False)
    for _ in range(3):
        reward._watch([0.5] * (IN_UNIT_INTERVAL_IN_A_ROW - 1))
        reward._watch([0.5, 1.5])
    with pytest.raises(BackendUnavailableError, match="sigmoid"):
        reward._watch([0.5] * IN_UNIT_INTERVAL_IN_A_ROW)
    bounded = RemoteRewardModel("m", server, VllmClassify(), bounded=True)
    bounded._watch([0.5] * 2 * IN_UNIT_INTERVAL_IN_A_ROW)
    assert (reward.healthy, bounded.healthy) == (False, True)


def test_changed_reward_model_becomes_unhealthy() -> None:
    server: Any = Refusing()
    reward = RemoteRewardModel("m", server, VllmClassify(), bounded=False)
    with pytest.raises(BackendUnavailableError, match="gives 2 numbers"):
        reward.score(Score(iteration=0, messages=(), responses=("a",)), lambda: None)
    assert not reward.healthy
