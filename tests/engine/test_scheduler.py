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
from tpo.backends.local.kv_allocator import Piece
from tpo.backends.local.requests import Completion, Ticket, Timings, TokenRequest
from tpo.backends.local.scheduler import ActiveSequence, Limits, PrefillChunk, Scheduler

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

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits, frozenset({STOP}))
        self.cache: dict[int, int] = {}
        self.tickets: list[Ticket] = []

    def submit(self, request: TokenRequest) -> None:
        self.tickets.append(Ticket(request, len(self.tickets), Timings(0.0), list(range(len(request.seeds)))))
        self.scheduler.add(self.tickets[-1])

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert sum(chunk.end - chunk.begin for chunk in plan.chunks) <= self.scheduler.limits.chunk
        assert len(plan.rows) <= self.scheduler.limits.rows
        assert plan.rows or plan.chunks or not self.scheduler.busy, "no sequence makes progress"
        self.read(plan.chunks)
        for row in plan.rows:
            self.cache[row.slot] = row.tokens[-1]
        for row in plan.rows:
            assert self.seen(row) == [*row.ticket.request.prompt, *row.tokens]
        self.scheduler.advance(plan.rows, [self.next_token(row) for row in plan.rows])

    def read(self, chunks: Sequence[PrefillChunk]) -> None:
        self.scheduler.read(chunks)
        for chunk in chunks:
            prompt, slots = chunk.reading.prompt, slots_of(chunk.reading.chain)
            assert [self.cache[slot] for slot in slots[: chunk.begin]] == list(prompt[: chunk.begin])
            self.cache.update(zip(slots[chunk.begin : chunk.end], prompt[chunk.begin : chunk.end], strict=True))
            if chunk.last:
                seeds = chunk.reading.ticket.request.seeds
                self.scheduler.join(chunk.reading, [drawn(seeds[sample], 0) for sample in chunk.reading.samples])

    def seen(self, row: ActiveSequence) -> list[int]:
        """Return the tokens that the row attends to."""
        own = [s.start + i for s in row.own for i in range(s.used)]
        return [self.cache[slot] for slot in (*slots_of(row.prefix), *own)]

    def next_token(self, row: ActiveSequence) -> int:
        return drawn(row.ticket.request.seeds[row.sample], len(row.tokens))

    def assert_holders_are_exact(self) -> None:
        """Assert that every segment has as many holders as there are chains that contain it."""
        scheduler = self.scheduler
        chains: list[Any] = [*(r.chain for r in scheduler.readings), *(row.prefix for row in scheduler.rows)]
        chains += scheduler.prefixes._kept.values()
        segments = [piece.segment for chain in chains for piece in chain] + [
            s for row in scheduler.rows for s in row.own
        ]
        holders = Counter(map(id, segments))
        each = {id(segment): segment for segment in segments}
        assert {number: segment.holders for number, segment in each.items()} == holders
        assert scheduler.arena.free == scheduler.arena.size - sum(segment.capacity for segment in each.values())


def slots_of(chain: Sequence[Piece]) -> list[int]:
    return [piece.segment.start + i for piece in chain for i in range(piece.length)]


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
    under_way=st.booleans(),
)
ACTIONS = st.one_of(
    REQUESTS, st.integers(1, 8), st.just("out of memory"), st.integers(0, 9).map(lambda number: ("cancel", number))
)


@settings(max_examples=400)
@given(
    actions=st.lists(ACTIONS, max_size=25),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 30),
    patience=st.integers(0, 3),
    first_slots=st.sampled_from([1, 2, 5, 128]),
)
def test_samples_get_their_tokens_and_no_slot_leaks(
    actions: list[Any], rows: int, chunk: int, patience: int, first_slots: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FIRST_SLOTS", first_slots)
        machine = Machine(Limits(rows, TOKENS, chunk, patience))
        for action in actions:
            match action:
                case TokenRequest():
                    machine.submit(action)
                case int():
                    for _ in range(action):
                        machine.step()
                        machine.assert_holders_are_exact()
                case ("cancel", int(number)):
                    for ticket in machine.tickets[number : number + 1]:
                        ticket.future.cancel()
                case _:
                    machine.scheduler.preempt_youngest()
                    machine.assert_holders_are_exact()
        for _ in range(3000):
            if not machine.scheduler.busy:
                break
            machine.step()
        assert not machine.scheduler.busy, "the scheduler did not finish"
        for ticket in machine.tickets:
            assert ticket.future.cancelled() or ticket.future.result(0).completions == answer(ticket.request)
        machine.scheduler.prefixes.forget()
        assert machine.scheduler.arena._gaps == [(1, TOKENS)]


@pytest.mark.parametrize(("length", "read"), [(3, [0, 0, 1]), (9, [0, 0, 1]), (10, [1, 1, 1])])
def test_prompt_waits_for_others_with_limited_patience(length: int, read: list[int]) -> None:
    machine = Machine(Limits(rows=6, tokens=TOKENS, chunk=10, patience=2))
    machine.submit(TokenRequest((1, 2, 3), (8,), 1.0, 1.0, 12))
    machine.step()
    machine.submit(TokenRequest((4,) * length, (8,), 1.0, 1.0, 12))
    assert [len(machine.scheduler.plan().chunks) for _ in range(3)] == read


def test_number_of_started_samples_fits_the_memory() -> None:
    machine = Machine(Limits(rows=6, tokens=TOKENS, chunk=10))
    machine.submit(TokenRequest((1, 2, 3), (1, 2, 3, 4), 1.0, 1.0, 12))
    machine.scheduler.plan()
    assert [reading.samples for reading in machine.scheduler.readings] == [[0, 1]]


def test_preempted_sample_waits_for_a_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_SLOTS", 2)
    machine = Machine(Limits(rows=6, tokens=TOKENS, chunk=TOKENS))
    longest = max(range(200), key=lambda seed: len(answer(TokenRequest((1,), (seed,), 1.0, 1.0, 30))[0].tokens))
    for prompt in ((1, 2), (3, 4)):
        machine.submit(TokenRequest(prompt, (longest,), 1.0, 1.0, 30))
    while machine.scheduler.busy:
        machine.step()
    assert [ticket.timings.preempted for ticket in machine.tickets] == [0, 1]
