"""Step engine against transformers' own generate, alone and in a batch."""

import itertools
import random
import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import pytest

from testing.waiting import HANG_SECONDS
from tests.support.step_engine import PROMPTS, generated, greedy, record, results, sampled, start
from tests.support.tiny_models import KINDS, load_kind
from tpo.backends.local.engine import StepEngine
from tpo.backends.local.requests import RequestOutput, TokenRequest


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_kind(request.param, tmp_path_factory.mktemp(request.param))


def test_greedy_tokens_equal_generate(model: Any) -> None:
    stop = frozenset({model.generation_config.eos_token_id})
    engine = start(model, stop)
    try:
        for replies, prompt in zip(results(engine, *(greedy(p, 3, 60) for p in PROMPTS)), PROMPTS, strict=True):
            expected = generated(model, prompt, 60)
            assert {reply.tokens for reply in replies} == {expected}
            assert {reply.finish_reason for reply in replies} == {"stop" if expected[-1] in stop else "length"}
    finally:
        engine.close()


def test_seed_gives_the_same_tokens_alone_and_batched(model: Any) -> None:
    engine = start(model, rows=64)
    requests = [sampled(p, *range(10 * i, 10 * i + 4), max_tokens=20 + 9 * i) for i, p in enumerate(PROMPTS)]
    try:
        alone = [results(engine, request)[0] for request in requests]
        assert results(engine, *requests) == alone
        assert len({c.tokens for completions in alone for c in completions}) > 12
    finally:
        engine.close()


def test_200_of_200_seeds_are_the_same_alone_and_batched(llama: Any) -> None:
    rng = random.Random(7)
    requests = [
        sampled(tuple(rng.randrange(250) for _ in range(rng.randint(3, 60))), i, max_tokens=rng.randint(5, 25))
        for i in range(200)
    ]
    engine = start(llama, rows=64, tokens=20_000)
    alone = [results(engine, request)[0] for request in requests]
    engine._scheduler.prefix_cache.clear()
    batched = results(engine, *requests)
    engine.close()
    assert sum(a == b for a, b in zip(alone, batched, strict=True)) == 200
    assert len(set(alone)) > 190


def test_rows_without_top_p_do_not_affect_others(engine: StepEngine) -> None:
    limited, free = sampled(PROMPTS[0], 1, 2, top_p=0.9), sampled(PROMPTS[1], 3, 4, top_p=1.0)
    assert results(engine, limited, free) == [results(engine, limited)[0], results(engine, free)[0]]


def test_stops_at_any_of_several_end_tokens(llama: Any) -> None:
    whole = generated(llama, PROMPTS[0], 30)
    for end in (whole[4], whole[9]):
        engine = start(llama, frozenset({end, 299_999}))
        (reply,) = results(engine, greedy(PROMPTS[0]))[0]
        engine.close()
        assert reply.tokens == whole[: whole.index(end) + 1]
        assert reply.finish_reason == "stop"


def test_single_token_is_a_valid_answer(engine: StepEngine) -> None:
    ((reply,),) = results(engine, greedy(PROMPTS[0], max_tokens=1))
    assert len(reply.tokens) == 1
    assert reply.finish_reason == "length"


def test_requests_wait_in_order_for_free_rows(llama: Any) -> None:
    engine = start(llama, rows=4)
    requests = [greedy(PROMPTS[i % 4], 1 + i % 3, 10 + i) for i in range(12)]
    finished: list[int] = []
    futures = [engine.submit(r) for r in requests]
    for i, future in enumerate(futures):
        future.add_done_callback(partial(record, finished, i))
    found = [future.result(60).completions for future in futures]
    engine.close()
    assert [len(a) for a in found] == [len(r.seeds) for r in requests]
    assert finished[0] < 4


def test_request_larger_than_the_batch_completes(llama: Any) -> None:
    engine = start(llama, rows=2)
    (replies,) = results(engine, greedy(PROMPTS[1], 6))
    engine.close()
    assert len(replies) == 6


def test_cancelled_request_leaves_between_two_tokens(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine._runner.decode
    writes, proceed = threading.Event(), threading.Event()

    def held(rows: Any) -> Any:
        if len(rows) == 5:
            writes.set()
            proceed.wait(HANG_SECONDS)
        return decode(rows)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "decode", held)
        endless = engine.submit(greedy(PROMPTS[0], 4, 4000))
        other = engine.submit(greedy(PROMPTS[1], 1, 200))
        assert writes.wait(HANG_SECONDS)
        endless.cancel()
        proceed.set()
        whole = other.result(60).completions
    assert engine.steps < 1000
    assert whole == results(engine, greedy(PROMPTS[1], 1, 200))[0]
    with pytest.raises(CancelledError):
        endless.result(0)


def test_joining_and_leaving_rows_do_not_affect_others(llama: Any) -> None:
    rng = random.Random(5)
    engine = start(llama, frozenset({7, 8}), rows=24)
    requests = [
        sampled(PROMPTS[rng.randrange(4)], *range(i, i + rng.randint(1, 6)), max_tokens=rng.randint(1, 80))
        for i in range(40)
    ]
    alone = [results(engine, request)[0] for request in requests]
    futures = []
    for request in requests:
        futures.append(engine.submit(request))
        time.sleep(rng.choice((0, 0, 0.01)))
        if rng.random() < 0.3:
            # Cancel one that is not answered yet. How many there are depends on the speed of the machine.
            rng.choice([f for f in futures if not f.done()] or futures).cancel()
    for future, expected in zip(futures, alone, strict=True):
        if not future.cancelled():
            assert future.result(60).completions == expected
    engine.close()
    assert sum(future.cancelled() for future in futures) > 3


@pytest.mark.parametrize("tokens", [300, 700])
def test_small_cache_gives_the_same_tokens(model: Any, tokens: int) -> None:
    requests = [sampled(PROMPTS[i % 4], *range(5 * i, 5 * i + 4), max_tokens=50) for i in range(6)]
    large, small = start(model, rows=64, tokens=20_000), start(model, rows=64, tokens=tokens)
    expected = results(large, *requests)
    found = results(small, *requests)
    large.close()
    small.close()
    assert found == expected
    small._scheduler.prefix_cache.clear()
    assert small._scheduler.allocator.free == tokens


def test_prompt_is_prefilled_once_and_in_chunks(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    whole = engine._runner.prefill

    def watched(chunks: Any) -> Any:
        parts.append(sum(c.end - c.begin for c in chunks))
        return whole(chunks)

    monkeypatch.setattr(engine._runner, "prefill", watched)
    prompt = tuple(range(200))
    (answer,) = results(engine, sampled(prompt, *range(8)))
    assert sum(parts) == len(prompt)
    assert max(parts) <= 64
    assert len(answer) == 8


def test_decoding_continues_during_a_long_prefill(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    read, write = engine._runner.prefill, engine._runner.decode

    def recorded(what: str, work: Any) -> Any:
        def call(argument: Any) -> Any:
            events.append(what)
            return work(argument)

        return call

    monkeypatch.setattr(engine._runner, "prefill", recorded("read", read))
    monkeypatch.setattr(engine._runner, "decode", recorded("write", write))
    first = engine.submit(greedy(PROMPTS[0], max_tokens=2000))
    while "write" not in events:
        time.sleep(0.001)
    long = engine.submit(greedy(tuple(i % 250 for i in range(640)), max_tokens=1))
    long.result(60)
    first.cancel()
    reads = [i for i, event in enumerate(events) if event == "read"][1:]
    assert len(reads) == 10
    assert all(events[a:b].count("write") == 1 for a, b in itertools.pairwise(reads))


def test_next_call_prefills_only_new_tokens(engine: StepEngine, llama: Any) -> None:
    def ask(prompt: tuple[int, ...], *seeds: int) -> RequestOutput:
        return engine.submit(sampled(prompt, *seeds, max_tokens=40)).result(60)

    critique = ask(PROMPTS[3], 1)
    assert critique.metrics.cached_tokens == 0
    second = (*PROMPTS[3], *critique.completions[0].tokens, *range(20))
    gradient = ask(second, 2)
    assert gradient.metrics.cached_tokens == len(PROMPTS[3]) + 39
    third = (*second, *gradient.completions[0].tokens, *range(20))
    update = ask(third, 3, 4, 5)
    assert update.metrics.cached_tokens == len(second) + 39
    fresh = start(llama)
    assert results(fresh, sampled(third, 3, 4, 5, max_tokens=40))[0] == update.completions
    fresh.close()


def test_continuation_is_admitted_before_new_requests(llama: Any) -> None:
    engine = start(llama, rows=1)
    order: list[int] = []
    endless = engine.submit(greedy(PROMPTS[0], 1, 4000))
    while not engine.running_sequences:
        time.sleep(0.001)
    new = engine.submit(greedy(PROMPTS[1]))
    continuation = engine.submit(TokenRequest(PROMPTS[2], (1,), 0.0, 1.0, 30, is_continuation=True))
    for number, future in enumerate((new, continuation)):
        future.add_done_callback(partial(record, order, number))
    endless.cancel()
    new.result(60)
    continuation.result(60)
    engine.close()
    assert order == [1, 0]


def test_request_is_cancelled_during_prefill(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = engine._runner.prefill
    reached, proceed = threading.Event(), threading.Event()

    def slow(chunks: Any) -> Any:
        reached.set()
        proceed.wait(HANG_SECONDS)
        return read(chunks)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "prefill", slow)
        long = engine.submit(greedy(tuple(i % 250 for i in range(3000)), 4))
        assert reached.wait(HANG_SECONDS)
        long.cancel()
        proceed.set()
    assert len(results(engine, greedy(PROMPTS[0]))) == 1
    assert not engine._scheduler.prefilling
    assert 3000 not in [len(tokens) for tokens in engine._scheduler.prefix_cache._entries]


def test_request_output_has_metrics(engine: StepEngine) -> None:
    metrics = engine.submit(greedy(PROMPTS[0], 2)).result(60).metrics
    assert metrics.started_at is not None
    assert metrics.first_token_at is not None
    assert metrics.finished_at is not None
    assert metrics.submitted_at <= metrics.started_at <= metrics.first_token_at <= metrics.finished_at
