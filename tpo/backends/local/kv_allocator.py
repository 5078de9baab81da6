"""Allocator for the slots of the KV cache. It only does the bookkeeping; the tensors belong to the runner.

The cache is one array of token slots. A segment is a run of consecutive slots with a reference count. A sequence
occupies a chain of segments. Sequences share the segments of a common prefix, so that nothing is copied.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Segment:
    """Slots `start` to `start + capacity`, of which the first `used` contain tokens."""

    start: int
    capacity: int
    used: int = 0
    ref_count: int = 1


@dataclass(frozen=True)
class SegmentSlice:
    """The first `length` tokens of a segment, as part of one sequence."""

    segment: Segment
    length: int


Chain = tuple[SegmentSlice, ...]


def chain_length(chain: Iterable[SegmentSlice]) -> int:
    """Return the number of tokens in a chain."""
    return sum(part.length for part in chain)


def truncate(chain: Sequence[SegmentSlice], length: int) -> Chain:
    """Return the first `length` tokens of a chain."""
    parts = []
    for part in chain:
        if length <= 0:
            break
        parts.append(part if part.length <= length else SegmentSlice(part.segment, length))
        length -= part.length
    return tuple(parts)


class KVCacheAllocator:
    """Allocates slots 1 to `size`. Slot 0 is a dummy: padding rows may write to it, and it is never allocated."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        """Number of free slots."""
        self._free_runs: list[tuple[int, int]] = [(1, size)]
        """Runs of free slots as (start, length), sorted by start; none is adjacent to another."""

    def allocate(self, count: int) -> list[Segment]:
        """Allocate `count` slots: one segment if a free run is long enough, otherwise several.

        Return an empty list if fewer slots are free.
        """
        if count > self.free or count <= 0:
            return []
        for i, (start, length) in enumerate(self._free_runs):
            if length >= count:
                return [self._split_run(i, start, length, count)]
        segments = []
        while count:
            i, (start, length) = max(enumerate(self._free_runs), key=lambda run: run[1][1])
            segments.append(self._split_run(i, start, length, min(count, length)))
            count -= segments[-1].capacity
        return segments

    def allocate_adjacent(self, count: int, each: int) -> list[Segment]:
        """Allocate `count` adjacent segments of `each` slots. Return an empty list if no free run is long enough."""
        run = next(
            (
                self._split_run(i, start, length, count * each)
                for i, (start, length) in enumerate(self._free_runs)
                if length >= count * each
            ),
            None,
        )
        return [Segment(run.start + i * each, each) for i in range(count)] if run else []

    def acquire(self, chain: Iterable[SegmentSlice]) -> None:
        """Increment the reference count of each segment of a chain."""
        for part in chain:
            part.segment.ref_count += 1

    def release(self, segments: Iterable[Segment]) -> None:
        """Decrement the reference count of each segment, and free the segments that reach 0."""
        for segment in segments:
            segment.ref_count -= 1
            if not segment.ref_count:
                self._free_run(segment.start, segment.capacity)
                segment.capacity = segment.used = 0

    def trim(self, segment: Segment) -> None:
        """Free the unused slots of a segment."""
        if segment.capacity > segment.used:
            self._free_run(segment.start + segment.used, segment.capacity - segment.used)
            segment.capacity = segment.used

    def _split_run(self, i: int, start: int, length: int, count: int) -> Segment:
        """Allocate the first `count` slots of the free run `i`, which is (start, length)."""
        if length > count:
            self._free_runs[i] = (start + count, length - count)
        else:
            del self._free_runs[i]
        self.free -= count
        return Segment(start, count)

    def _free_run(self, start: int, count: int) -> None:
        """Free a run of slots, and merge it with adjacent free runs."""
        if not count:
            return
        self.free += count
        insort(self._free_runs, (start, count))
        i = self._free_runs.index((start, count))
        if i + 1 < len(self._free_runs) and start + count == self._free_runs[i + 1][0]:
            count += self._free_runs.pop(i + 1)[1]
            self._free_runs[i] = (start, count)
        if i and sum(self._free_runs[i - 1]) == start:
            self._free_runs[i - 1] = (self._free_runs[i - 1][0], self._free_runs[i - 1][1] + count)
            del self._free_runs[i]
