"""Ownership of cache slots: none is leaked, and none is written while another sequence reads it."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpo.backends.local.kv_allocator import KVCacheAllocator, Piece, Segment, chain_length, cut
from tpo.backends.local.prefix_cache import PrefixCache
from tpo.backends.local.requests import Ticket, Timings, TokenRequest
from tpo.backends.local.scheduler import ActiveSequence
from tpo.backends.local.tables import Tables, work

SIZE = 60


class Holders(RuleBasedStateMachine):
    """Sequences that take, share, trim and release segments, and a prefix cache that keeps some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = KVCacheAllocator(SIZE)
        self.prefixes = PrefixCache(self.arena)
        self.held: list[list[Segment]] = []

    @rule(count=st.integers(1, 25), used=st.integers(0, 25))
    def take(self, count: int, used: int) -> None:
        free = self.arena.free
        segments = self.arena.take(count)
        assert sum(s.capacity for s in segments) == (count if count <= free else 0)
        for segment in segments:
            segment.used = min(used, segment.capacity)
        if segments:
            self.held.append(segments)

    @rule(count=st.integers(1, 5), each=st.integers(1, 8))
    def take_side_by_side(self, count: int, each: int) -> None:
        segments = self.arena.take_equal(count, each)
        assert [s.start - segments[0].start for s in segments] == [i * each for i in range(len(segments))]
        self.held += [[segment] for segment in segments]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        segments = data.draw(st.sampled_from(self.held))
        self.arena.hold(Piece(s, s.used) for s in segments)
        self.held.append(list(segments))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.arena.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        segments = data.draw(st.sampled_from(self.held))
        if segments[-1].used:
            self.arena.trim(segments[-1])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(0, 3))
    def keep(self, data: st.DataObject, tokens: int) -> None:
        chain = tuple(Piece(s, s.used) for s in data.draw(st.sampled_from(self.held)) if s.used)
        if chain:
            self.prefixes.keep((tokens,) * chain_length(chain), chain)

    @rule()
    def forget(self) -> None:
        self.prefixes.forget_one()

    @invariant()
    def every_slot_is_free_or_has_its_holders(self) -> None:
        chains = [*self.held, *([p.segment for p in chain] for chain in self.prefixes._kept.values())]
        segments = {id(s): s for chain in chains for s in chain}
        owned = [slot for s in segments.values() for slot in range(s.start, s.start + s.capacity)]
        free = [slot for start, length in self.arena._gaps for slot in range(start, start + length)]
        assert sorted(owned + free) == list(range(1, SIZE + 1))
        assert len(free) == self.arena.free
        for segment in segments.values():
            assert segment.holders == sum(s is segment for chain in chains for s in chain)
        ends = [start + length for start, length in self.arena._gaps]
        assert all(end < start for end, (start, _) in zip(ends, self.arena._gaps[1:], strict=False))

    def teardown(self) -> None:
        for segments in self.held:
            self.arena.release(segments)
        self.prefixes.forget()
        assert self.arena._gaps == [(1, SIZE)]


Holders.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestHolders = Holders.TestCase


def test_least_recently_used_prefix_is_evicted_first() -> None:
    arena = KVCacheAllocator(SIZE)
    prefixes = PrefixCache(arena)
    first, second = ((token,) * 17 for token in (1, 2))
    for tokens in (first, second):
        segments = arena.take(17)
        prefixes.keep(tokens, tuple(Piece(segment, 17) for segment in segments))
        arena.release(segments)
    assert chain_length(prefixes.longest(first)) == 16
    prefixes.forget_one()
    assert (chain_length(prefixes.longest(first)), prefixes.longest(second)) == (16, ())


@given(lengths=st.lists(st.integers(1, 9), max_size=6), length=st.integers(0, 60))
def test_chain_is_cut_to_a_length(lengths: list[int], length: int) -> None:
    chain = tuple(Piece(Segment(1, n, n), n) for n in lengths)
    assert chain_length(cut(chain, length)) == min(length, sum(lengths))


def row_of(prefix: tuple[Piece, ...], own: list[Segment]) -> ActiveSequence:
    ticket = Ticket(TokenRequest((1,) * chain_length(prefix), (0,), 0.0, 1.0, 99), 0, Timings(0.0))
    return ActiveSequence(ticket, 0, prefix, [1], own)


def apply_update(table: dict[int, int], tables: Tables, rows: list[ActiveSequence]) -> None:
    """Apply the changed table entries to `table`."""
    writes: Any = tables.update(rows)
    if writes is not None:
        table.update(zip(writes.at.tolist(), writes.slots.tolist(), strict=True))


def test_tables_list_slots_and_are_reused() -> None:
    arena, tables, table = KVCacheAllocator(1000), Tables(3, 100), dict[int, int]()
    prefix = tuple(Piece(s, s.capacity) for s in arena.take(20))
    rows = [row_of(prefix, arena.take(7)) for _ in range(3)]
    apply_update(table, tables, rows)
    rows[1].own += arena.take(14)
    apply_update(table, tables, rows)
    assert tables.update(rows) is None
    for row in rows:
        slots = [p.segment.start + i for p in row.prefix for i in range(p.length)]
        slots += [s.start + i for s in row.own for i in range(s.capacity)]
        assert [table[row.table * 100 + i] for i in range(len(slots))] == slots
    numbers = {row.table for row in rows}
    assert numbers == {0, 1, 2}
    late = row_of(prefix, arena.take(5))
    apply_update(table, tables, [rows[0], late, rows[2]])
    assert {rows[0].table, late.table, rows[2].table} == numbers


def test_forgotten_tables_are_written_again() -> None:
    arena, tables, table = KVCacheAllocator(1000), Tables(3, 100), dict[int, int]()
    prefix = tuple(Piece(s, s.capacity) for s in arena.take(20))
    rows = [row_of(prefix, arena.take(7)) for _ in range(3)]
    assert tables.update(rows) is not None
    tables.forget()
    late = [rows[1], row_of(prefix, arena.take(5)), rows[0]]
    apply_update(table, tables, late)
    assert {row.table for row in late} == {0, 1, 2}
    for row in late:
        slots = [*range(prefix[0].segment.start, prefix[0].segment.start + 20), row.own[0].start]
        assert [table[row.table * 100 + i] for i in range(21)] == slots


@given(
    st.lists(
        st.tuples(st.integers(1, 700), st.lists(st.integers(1, 900), min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_work_covers_every_token_of_every_row_once(groups: list[tuple[int, list[int]]]) -> None:
    rows, at = [], 1
    for shared, owns in groups:
        prefix = (Piece(Segment(at, shared, shared), shared),)
        at += shared
        for own in owns:
            rows.append(row_of(prefix, [Segment(at, own)]))
            rows[-1].table = len(rows) - 1
            at += own
    todo = work(rows, rows_an_item=2, aim=8, most=200)
    seen: list[list[int]] = [[] for _ in rows]
    for first, count, _, begin, end, part in todo.items.tolist():
        for i in range(first, first + count):
            assert part < todo.parts[i]
            seen[i] += range(begin, end)
    assert [sorted(s) for s in seen] == [
        list(range(chain_length(r.prefix) + sum(s.capacity for s in r.own))) for r in rows
    ]
