"""Step engine: invalid requests, failing models, memory limits and shutdown."""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from testing.waiting import HANG_SECONDS
from tests.support.step_engine import PROMPTS, answers, greedy, results, sampled, start
from tpo.backends.local import watchdog
from tpo.backends.local.engine import StepEngine
from tpo.core.errors import BackendUnavailableError, BadReplyError, ContextTooLongError, PromptRefusedError


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
        poisoned = self.poison and any(c.prefill.prompt == self.poison for c in work)
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


def test_stop_check_is_never_called_with_an_invalid_token(llama: Any) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = torch.nan
    engine = start(model)

    def stop_check(tokens: Sequence[int]) -> bool:
        if min(tokens) < 0:
            raise OverflowError("a tokenizer knows no negative tokens")
        return False

    bad, good = (engine.submit(replace(greedy(prompt), stop_check=stop_check)) for prompt in ((299, 5), PROMPTS[0]))
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
    assert sum(answer.metrics.preemptions for answer in found) > 0


def test_out_of_memory_of_a_single_sample_fails_only_it(engine: StepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Broken(patch, engine, "decode", NO_MEMORY, 1)
        with pytest.raises(BackendUnavailableError, match="TPO_CACHE_GIB"):
            results(engine, greedy(PROMPTS[0]))
    assert engine.healthy
    assert len(results(engine, greedy(PROMPTS[0]))) == 1


def test_dead_loop_fails_all_requests(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(llama, rows=1)
    running, waiting = engine.submit(greedy(PROMPTS[0], 1, 4000)), engine.submit(greedy(PROMPTS[1]))
    while not engine.running_sequences:
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
        patch.setattr(watchdog, "TIMEOUT_SECONDS", 0.0)
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
