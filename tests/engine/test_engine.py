"""Step engine against transformers' own generate, alone and in a batch."""

import copy
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testing.waiting import HANG_SECONDS
from tests.support.tiny_models import KINDS, load_kind
from tpo.backends.local import watchdog
from tpo.backends.local.engine import StepEngine
from tpo.backends.local.requests import Answer, Completion, TokenRequest
from tpo.backends.local.runner import Runner, install_attention
from tpo.backends.local.scheduler import Limits
from tpo.core.errors import BackendUnavailableError, BadReplyError, ContextTooLongError, PromptRefusedError

Completions = tuple[Completion, ...]

PROMPTS = [tuple((7 * i + 3 * j) % 250 for j in range(length)) for i, length in enumerate((5, 40, 17, 90))]


def greedy(prompt: tuple[int, ...], n: int = 1, max_tokens: int = 30) -> TokenRequest:
    return TokenRequest(prompt, tuple(range(n)), 0.0, 1.0, max_tokens)


def sampled(prompt: tuple[int, ...], *seeds: int, top_p: float = 0.95, max_tokens: int = 30) -> TokenRequest:
    return TokenRequest(prompt, seeds, 0.7, top_p, max_tokens)


def start(
    model: Any, stop: frozenset[int] = frozenset(), rows: int = 16, tokens: int = 10_000, chunk: int = 64
) -> StepEngine:
    """Start an engine on a copy of the model, so that the attention of the original is not changed."""
    model = copy.deepcopy(model)
    return StepEngine(Runner(model, install_attention(model, "model"), tokens), Limits(rows, tokens, chunk), stop)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_kind(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture
def engine(llama: Any) -> Iterator[StepEngine]:
    engine = start(llama)
    yield engine
    engine.close()


def results(engine: StepEngine, *requests: TokenRequest) -> list[Completions]:
    return [answer.completions for answer in answers(engine, *requests)]


def answers(engine: StepEngine, *requests: TokenRequest) -> list[Answer]:
    """Submit all requests before the next step begins, and return their answers."""
    with engine._changed:
        futures = [engine.submit(request) for request in requests]
    return [future.result(60) for future in futures]


def record(finished: list[int], number: int, _: object) -> None:
    finished.append(number)


def generated(model: Any, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, top_k=None, top_p=None
    )
    return tuple(out[0, len(prompt) :].tolist())


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
    engine._scheduler.prefixes.forget()
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


def test_unknown_token_is_rejected_at_submit(engine: StepEngine) -> None:
    for prompt in ((5, 999_999), (-1,), ()):
        with pytest.raises(PromptRefusedError):
            engine.submit(greedy(prompt))


def test_request_beyond_the_memory_is_rejected_at_submit(llama: Any) -> None:
    engine = start(llama, tokens=100)
    with pytest.raises(ContextTooLongError, match="TPO_CACHE_GIB"):
        engine.submit(greedy(PROMPTS[3], max_tokens=12))
    assert len(results(engine, greedy(PROMPTS[3], max_tokens=11))[0][0].tokens) == 11
    engine.close()


class Broken:
    """Makes a runner fail a number of times, or for one prompt."""

    def __init__(
        self, patch: pytest.MonkeyPatch, engine: StepEngine, method: str, error: Exception, times: int
    ) -> None:
        self.left = times
        self._error = error
        self._original = getattr(engine._runner, method)
        self.poison: tuple[int, ...] | None = None
        patch.setattr(engine._runner, method, self)

    def __call__(self, work: Any) -> Any:
        poisoned = self.poison and any(c.reading.prompt == self.poison for c in work)
        if self.left > 0 and (poisoned or not self.poison):
            self.left -= 1
            raise self._error
        return self._original(work)


def test_request_that_breaks_the_model_fails_alone(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, engine, "prefill", IndexError("out of range"), 99)
    broken.poison = PROMPTS[2]
    futures = [engine.submit(greedy(prompt)) for prompt in PROMPTS]
    with pytest.raises(BackendUnavailableError, match="out of range"):
        futures[2].result(60)
    assert all(len(futures[i].result(60).completions) == 1 for i in (0, 1, 3))
    assert engine.healthy


def test_nan_logits_fail_only_their_request(llama: Any) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = torch.nan
    engine = start(model)
    bad, good = engine.submit(greedy((299, 5))), engine.submit(greedy(PROMPTS[0]))
    with pytest.raises(BadReplyError, match="float32"):
        bad.result(60)
    assert len(good.result(60).completions) == 1
    engine.close()


def test_ended_is_never_called_with_an_invalid_token(llama: Any) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = torch.nan
    engine = start(model)

    def ended(tokens: Sequence[int]) -> bool:
        if min(tokens) < 0:
            raise OverflowError("a tokenizer knows no negative tokens")
        return False

    bad, good = (engine.submit(replace(greedy(prompt), ended=ended)) for prompt in ((299, 5), PROMPTS[0]))
    with pytest.raises(BadReplyError, match="float32"):
        bad.result(60)
    assert len(good.result(60).completions) == 1
    assert engine.healthy
    engine.close()


NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_out_of_memory_preempts_the_youngest(llama: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    requests = [sampled(p, *range(10 * i, 10 * i + 4)) for i, p in enumerate(PROMPTS)]
    whole = start(llama)
    expected = results(whole, *requests)
    whole.close()
    engine = start(llama)
    Broken(monkeypatch, engine, method, NO_MEMORY, 2)
    found = answers(engine, *requests)
    engine.close()
    assert [answer.completions for answer in found] == expected
    assert sum(answer.timings.preempted for answer in found) > 0


def test_out_of_memory_of_a_single_sample_fails_only_it(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Broken(patch, engine, "decode", NO_MEMORY, 1)
        with pytest.raises(BackendUnavailableError, match="TPO_CACHE_GIB"):
            results(engine, greedy(PROMPTS[0]))
    assert engine.healthy
    assert len(results(engine, greedy(PROMPTS[0]))) == 1


@pytest.mark.parametrize("tokens", [300, 700])
def test_small_cache_gives_the_same_tokens(model: Any, tokens: int) -> None:
    requests = [sampled(PROMPTS[i % 4], *range(5 * i, 5 * i + 4), max_tokens=50) for i in range(6)]
    large, small = start(model, rows=64, tokens=20_000), start(model, rows=64, tokens=tokens)
    expected = results(large, *requests)
    found = results(small, *requests)
    large.close()
    small.close()
    assert found == expected
    small._scheduler.prefixes.forget()
    assert small._scheduler.arena.free == tokens


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
    def ask(prompt: tuple[int, ...], *seeds: int) -> Answer:
        return engine.submit(sampled(prompt, *seeds, max_tokens=40)).result(60)

    critique = ask(PROMPTS[3], 1)
    assert critique.timings.reused_tokens == 0
    second = (*PROMPTS[3], *critique.completions[0].tokens, *range(20))
    gradient = ask(second, 2)
    assert gradient.timings.reused_tokens == len(PROMPTS[3]) + 39
    third = (*second, *gradient.completions[0].tokens, *range(20))
    update = ask(third, 3, 4, 5)
    assert update.timings.reused_tokens == len(second) + 39
    fresh = start(llama)
    assert results(fresh, sampled(third, 3, 4, 5, max_tokens=40))[0] == update.completions
    fresh.close()


def test_running_jobs_have_priority_for_rows(llama: Any) -> None:
    engine = start(llama, rows=1)
    order: list[int] = []
    endless = engine.submit(greedy(PROMPTS[0], 1, 4000))
    while not engine.rows:
        time.sleep(0.001)
    new = engine.submit(greedy(PROMPTS[1]))
    under_way = engine.submit(TokenRequest(PROMPTS[2], (1,), 0.0, 1.0, 30, under_way=True))
    for number, future in enumerate((new, under_way)):
        future.add_done_callback(partial(record, order, number))
    endless.cancel()
    new.result(60)
    under_way.result(60)
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
    assert not engine._scheduler.readings
    assert 3000 not in [len(tokens) for tokens in engine._scheduler.prefixes._kept]


def test_answer_has_timings(engine: StepEngine) -> None:
    times = engine.submit(greedy(PROMPTS[0], 2)).result(60).timings
    assert times.started is not None
    assert times.first_token is not None
    assert times.finished is not None
    assert times.submitted <= times.started <= times.first_token <= times.finished


def test_dead_loop_fails_all_requests(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(llama, rows=1)
    running, waiting = engine.submit(greedy(PROMPTS[0], 1, 4000)), engine.submit(greedy(PROMPTS[1]))
    while not engine.rows:
        time.sleep(0.001)
    monkeypatch.setattr(engine._runner, "decode", None)
    for future in (running, waiting):
        with pytest.raises(BackendUnavailableError, match="died"):
            future.result(60)
    assert not engine.healthy
    with pytest.raises(BackendUnavailableError, match="died"):
        engine.submit(greedy(PROMPTS[0]))
    engine.close()


def test_hanging_pass_makes_the_engine_unhealthy(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, proceed = threading.Event(), threading.Event()
    decode = engine._runner.decode

    def stuck(rows: Any) -> Any:
        hangs.set()
        proceed.wait(HANG_SECONDS)
        return decode(rows)

    monkeypatch.setattr(engine._runner, "decode", stuck)
    future = engine.submit(greedy(PROMPTS[0]))
    assert hangs.wait(HANG_SECONDS)
    assert engine.healthy
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "STUCK_SECONDS", 0.0)
        assert not engine.healthy
    proceed.set()
    assert len(future.result(60).completions) == 1
    assert engine.healthy


def test_close_fails_waiting_requests(llama: Any) -> None:
    engine = start(llama, rows=1)
    futures = [engine.submit(greedy(PROMPTS[0], 1, 4000)) for _ in range(3)]
    engine.close()
    for future in futures:
        with pytest.raises(BackendUnavailableError, match="closed"):
            future.result(1)
    assert not any(thread.name == "engine" and thread is engine._thread for thread in threading.enumerate())
