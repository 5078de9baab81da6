"""Scheduler with a model made of a hash: each sample gets its own tokens, whatever joins, leaves or is preempted.

The cache is a dictionary of slots, so a token in a wrong or overwritten slot is detected.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo.backends.local import scheduler as module
from tpo.backends.local.kv_allocator import SegmentSlice
from tpo.backends.local.requests import Completion, EngineRequest, RequestMetrics, TokenRequest
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk, Scheduler, SchedulerConfig

STOP = 0
TOKENS = 40
"""Capacity of the cache. Prompts and answers below need 36 tokens at most."""


def drawn(seed: int, step: int) -> int:
    """Return the token that a seed draws at a step. One in nine ends the answer."""
    return random.Random(1000 * seed + step).randrange(9)


def answer(request: TokenRequest) -> tuple[Completion, ...]:
    """Return the completions that the request must get."""
    completions = []
    for seed in request.seeds:
        tokens: list[int] = []
        while len(tokens) < request.max_tokens and (not tokens or tokens[-1] != STOP):
            tokens.append(drawn(seed, len(tokens)))
        completions.append(Completion(tuple(tokens), "stop" if tokens[-1] == STOP else "length"))
    return tuple(completions)


class Machine:
    """Scheduler, and the cache contents that its steps would have written."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config, frozenset({STOP}))
        self.cache: dict[int, int] = {}
        self.requests: list[EngineRequest] = []

    def submit(self, request: TokenRequest) -> None:
        self.requests.append(
            EngineRequest(request, len(self.requests), RequestMetrics(0.0), list(range(len(request.seeds))))
        )
        self.scheduler.add(self.requests[-1])

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert sum(chunk.end - chunk.begin for chunk in plan.chunks) <= self.scheduler.config.prefill_tokens
        assert len(plan.sequences) <= self.scheduler.config.max_sequences
        assert plan.sequences or plan.chunks or not self.scheduler.has_work, "no sequence makes progress"
        self.prefill(plan.chunks)
        for sequence in plan.sequences:
            self.cache[sequence.slot] = sequence.tokens[-1]
        for sequence in plan.sequences:
            assert self.seen(sequence) == [*sequence.request.inputs.prompt, *sequence.tokens]
        self.scheduler.append_tokens(plan.sequences, [self.next_token(sequence) for sequence in plan.sequences])

    def prefill(self, chunks: Sequence[PrefillChunk]) -> None:
        self.scheduler.record_prefilled(chunks)
        for chunk in chunks:
            prompt, slots = chunk.prefill.prompt, slots_of(chunk.prefill.chain)
            assert [self.cache[slot] for slot in slots[: chunk.begin]] == list(prompt[: chunk.begin])
            self.cache.update(zip(slots[chunk.begin : chunk.end], prompt[chunk.begin : chunk.end], strict=True))
            if chunk.is_last:
                seeds = chunk.prefill.request.inputs.seeds
                self.scheduler.start_decoding(
                    chunk.prefill, [drawn(seeds[sample], 0) for sample in chunk.prefill.samples]
                )

    def seen(self, sequence: ActiveSequence) -> list[int]:
        """Return the tokens that the sequence attends to."""
        own = [s.start + i for s in sequence.segments for i in range(s.used)]
        return [self.cache[slot] for slot in (*slots_of(sequence.prefix), *own)]

    def next_token(self, sequence: ActiveSequence) -> int:
        return drawn(sequence.request.inputs.seeds[sequence.sample], len(sequence.tokens))

    def assert_references_are_exact(self) -> None:
        """Assert that every segment has a reference for each chain that contains it."""
        scheduler = self.scheduler
        chains: list[Any] = [
            *(r.chain for r in scheduler.prefilling),
            *(sequence.prefix for sequence in scheduler.running),
        ]
        chains += scheduler.prefix_cache._entries.values()
        segments = [part.segment for chain in chains for part in chain] + [
            s for sequence in scheduler.running for s in sequence.segments
        ]
        references = Counter(map(id, segments))
        each = {id(segment): segment for segment in segments}
        assert {number: segment.ref_count for number, segment in each.items()} == references
        assert scheduler.allocator.free == scheduler.allocator.size - sum(segment.capacity for segment in each.values())


def slots_of(chain: Sequence[SegmentSlice]) -> list[int]:
    return [part.segment.start + i for part in chain for i in range(part.length)]


# Prompts with common prefixes, which end at and between the block boundaries of the prefix cache.
PROMPTS = st.builds(
    lambda common, own: (1, 2, 3, 4) * common + own,
    st.integers(0, 5),
    st.lists(st.integers(1, 2), max_size=4).map(tuple),
).filter(len)
REQUESTS = st.builds(
    TokenRequest,
    prompt=PROMPTS,
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4).map(tuple),
    temperature=st.just(1.0),
    top_p=st.just(1.0),
    max_tokens=st.integers(1, 12),
    is_continuation=st.booleans(),
)
ACTIONS = st.one_of(
    REQUESTS, st.integers(1, 8), st.just("out of memory"), st.integers(0, 9).map(lambda number: ("cancel", number))
)


@settings(max_examples=400)
@given(
    actions=st.lists(ACTIONS, max_size=25),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 30),
    max_wait_steps=st.integers(0, 3),
    first_slots=st.sampled_from([1, 2, 5, 128]),
)
def test_samples_get_their_tokens_and_no_slot_leaks(
    actions: list[Any], rows: int, chunk: int, max_wait_steps: int, first_slots: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INITIAL_SLOTS", first_slots)
        machine = Machine(SchedulerConfig(rows, TOKENS, chunk, max_wait_steps))
        for action in actions:
            match action:
                case TokenRequest():
                    machine.submit(action)
                case int():
                    for _ in range(action):
                        machine.step()
                        machine.assert_references_are_exact()
                case ("cancel", int(number)):
                    for request in machine.requests[number : number + 1]:
                        request.future.cancel()
                case _:
                    machine.scheduler.preempt_youngest()
                    machine.assert_references_are_exact()
        for _ in range(3000):
            if not machine.scheduler.has_work:
                break
            machine.step()
        assert not machine.scheduler.has_work, "the scheduler did not finish"
        for request in machine.requests:
            assert request.future.cancelled() or request.future.result(0).completions == answer(request.inputs)
        machine.scheduler.prefix_cache.clear()
        assert machine.scheduler.allocator._free_runs == [(1, TOKENS)]


@pytest.mark.parametrize(("length", "read"), [(3, [0, 0, 1]), (9, [0, 0, 1]), (10, [1, 1, 1])])
def test_prompt_waits_for_others_with_limited_patience(length: int, read: list[int]) -> None:
    machine = Machine(SchedulerConfig(max_sequences=6, cache_slots=TOKENS, prefill_tokens=10, max_wait_steps=2))
    machine.submit(TokenRequest((1, 2, 3), (8,), 1.0, 1.0, 12))
    machine.step()
    machine.submit(TokenRequest((4,) * length, (8,), 1.0, 1.0, 12))
    assert [len(machine.scheduler.plan().chunks) for _ in range(3)] == read


def test_number_of_started_samples_fits_the_memory() -> None:
    machine = Machine(SchedulerConfig(max_sequences=6, cache_slots=TOKENS, prefill_tokens=10))
    machine.submit(TokenRequest((1, 2, 3), (1, 2, 3, 4), 1.0, 1.0, 12))
    machine.scheduler.plan()
    assert [prefill.samples for prefill in machine.scheduler.prefilling] == [[0, 1]]


def test_preempted_sample_waits_for_a_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INITIAL_SLOTS", 2)
    machine = Machine(SchedulerConfig(max_sequences=6, cache_slots=TOKENS, prefill_tokens=TOKENS))
    longest = max(range(200), key=lambda seed: len(answer(TokenRequest((1,), (seed,), 1.0, 1.0, 30))[0].tokens))
    for prompt in ((1, 2), (3, 4)):
        machine.submit(TokenRequest(prompt, (longest,), 1.0, 1.0, 30))
    while machine.scheduler.has_work:
        machine.step()
    assert [request.metrics.preemptions for request in machine.requests] == [0, 1]
