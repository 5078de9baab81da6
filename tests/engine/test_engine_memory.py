"""Ownership of cache slots: none is leaked, and none is written while another sequence reads it."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpo.backends.local.kv_allocator import KVCacheAllocator, Segment, SegmentSlice, chain_length, truncate
from tpo.backends.local.prefix_cache import PrefixCache
from tpo.backends.local.requests import EngineRequest, RequestMetrics, TokenRequest
from tpo.backends.local.scheduler import ActiveSequence
from tpo.backends.local.tables import SlotTables, plan_work_items

SIZE = 60


class SegmentOwners(RuleBasedStateMachine):
    """Sequences that allocate, share, trim and release segments, and a prefix cache that references some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = KVCacheAllocator(SIZE)
        self.prefix_cache = PrefixCache(self.allocator)
        self.held: list[list[Segment]] = []

    @rule(count=st.integers(1, 25), used=st.integers(0, 25))
    def allocate(self, count: int, used: int) -> None:
        free = self.allocator.free
        segments = self.allocator.allocate(count)
        assert sum(s.capacity for s in segments) == (count if count <= free else 0)
        for segment in segments:
            segment.used = min(used, segment.capacity)
        if segments:
            self.held.append(segments)

    @rule(count=st.integers(1, 5), each=st.integers(1, 8))
    def allocate_adjacent(self, count: int, each: int) -> None:
        segments = self.allocator.allocate_adjacent(count, each)
        assert [s.start - segments[0].start for s in segments] == [i * each for i in range(len(segments))]
        self.held += [[segment] for segment in segments]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        segments = data.draw(st.sampled_from(self.held))
        self.allocator.acquire(SegmentSlice(s, s.used) for s in segments)
        self.held.append(list(segments))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.allocator.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        segments = data.draw(st.sampled_from(self.held))
        if segments[-1].used:
            self.allocator.trim(segments[-1])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(0, 3))
    def insert_prefix(self, data: st.DataObject, tokens: int) -> None:
        chain = tuple(SegmentSlice(s, s.used) for s in data.draw(st.sampled_from(self.held)) if s.used)
        if chain:
            self.prefix_cache.insert((tokens,) * chain_length(chain), chain)

    @rule()
    def evict_prefix(self) -> None:
        self.prefix_cache.evict()

    @invariant()
    def every_slot_is_free_or_referenced(self) -> None:
        chains = [*self.held, *([p.segment for p in chain] for chain in self.prefix_cache._entries.values())]
        segments = {id(s): s for chain in chains for s in chain}
        owned = [slot for s in segments.values() for slot in range(s.start, s.start + s.capacity)]
        free = [slot for start, length in self.allocator._free_runs for slot in range(start, start + length)]
        assert sorted(owned + free) == list(range(1, SIZE + 1))
        assert len(free) == self.allocator.free
        for segment in segments.values():
            assert segment.ref_count == sum(s is segment for chain in chains for s in chain)
        ends = [start + length for start, length in self.allocator._free_runs]
        assert all(end < start for end, (start, _) in zip(ends, self.allocator._free_runs[1:], strict=False))

    def teardown(self) -> None:
        for segments in self.held:
            self.allocator.release(segments)
        self.prefix_cache.clear()
        assert self.allocator._free_runs == [(1, SIZE)]


SegmentOwners.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestSegmentOwners = SegmentOwners.TestCase


def test_least_recently_used_prefix_is_evicted_first() -> None:
    allocator = KVCacheAllocator(SIZE)
    prefix_cache = PrefixCache(allocator)
    first, second = ((token,) * 17 for token in (1, 2))
    for tokens in (first, second):
        segments = allocator.allocate(17)
        prefix_cache.insert(tokens, tuple(SegmentSlice(segment, 17) for segment in segments))
        allocator.release(segments)
    assert chain_length(prefix_cache.match(first)) == 16
    prefix_cache.evict()
    assert (chain_length(prefix_cache.match(first)), prefix_cache.match(second)) == (16, ())


@given(lengths=st.lists(st.integers(1, 9), max_size=6), length=st.integers(0, 60))
def test_chain_is_truncated_to_a_length(lengths: list[int], length: int) -> None:
    chain = tuple(SegmentSlice(Segment(1, n, n), n) for n in lengths)
    assert chain_length(truncate(chain, length)) == min(length, sum(lengths))


def row_of(prefix: tuple[SegmentSlice, ...], own: list[Segment]) -> ActiveSequence:
    request = EngineRequest(TokenRequest((1,) * chain_length(prefix), (0,), 0.0, 1.0, 99), 0, RequestMetrics(0.0))
    return ActiveSequence(request, 0, prefix, [1], own)


def apply_update(table: dict[int, int], tables: SlotTables, rows: list[ActiveSequence]) -> None:
    """Apply the changed table entries to `table`."""
    writes: Any = tables.update(rows)
    if writes is not None:
        table.update(zip(writes.indices.tolist(), writes.slots.tolist(), strict=True))


def test_tables_list_slots_and_are_reused() -> None:
    allocator, tables, table = KVCacheAllocator(1000), SlotTables(3, 100), dict[int, int]()
    prefix = tuple(SegmentSlice(s, s.capacity) for s in allocator.allocate(20))
    rows = [row_of(prefix, allocator.allocate(7)) for _ in range(3)]
    apply_update(table, tables, rows)
    rows[1].segments += allocator.allocate(14)
    apply_update(table, tables, rows)
    assert tables.update(rows) is None
    for row in rows:
        slots = [p.segment.start + i for p in row.prefix for i in range(p.length)]
        slots += [s.start + i for s in row.segments for i in range(s.capacity)]
        assert [table[row.table_index * 100 + i] for i in range(len(slots))] == slots
    numbers = {row.table_index for row in rows}
    assert numbers == {0, 1, 2}
    late = row_of(prefix, allocator.allocate(5))
    apply_update(table, tables, [rows[0], late, rows[2]])
    assert {rows[0].table_index, late.table_index, rows[2].table_index} == numbers


def test_cleared_tables_are_written_again() -> None:
    allocator, tables, table = KVCacheAllocator(1000), SlotTables(3, 100), dict[int, int]()
    prefix = tuple(SegmentSlice(s, s.capacity) for s in allocator.allocate(20))
    rows = [row_of(prefix, allocator.allocate(7)) for _ in range(3)]
    assert tables.update(rows) is not None
    tables.clear()
    late = [rows[1], row_of(prefix, allocator.allocate(5)), rows[0]]
    apply_update(table, tables, late)
    assert {row.table_index for row in late} == {0, 1, 2}
    for row in late:
        slots = [*range(prefix[0].segment.start, prefix[0].segment.start + 20), row.segments[0].start]
        assert [table[row.table_index * 100 + i] for i in range(21)] == slots


@given(
    st.lists(
        st.tuples(st.integers(1, 700), st.lists(st.integers(1, 900), min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_work_covers_every_token_of_every_row_once(groups: list[tuple[int, list[int]]]) -> None:
    rows, at = [], 1
    for shared, owns in groups:
        prefix = (SegmentSlice(Segment(at, shared, shared), shared),)
        at += shared
        for own in owns:
            rows.append(row_of(prefix, [Segment(at, own)]))
            rows[-1].table_index = len(rows) - 1
            at += own
    work = plan_work_items(rows, rows_per_item=2, target_items=8, max_items=200)
    seen: list[list[int]] = [[] for _ in rows]
    for first, count, _, begin, end, part in work.items.tolist():
        for i in range(first, first + count):
            assert part < work.part_counts[i]
            seen[i] += range(begin, end)
    assert [sorted(s) for s in seen] == [
        list(range(chain_length(r.prefix) + sum(s.capacity for s in r.segments))) for r in rows
    ]
