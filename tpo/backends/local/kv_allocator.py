"""Allocator for the slots of the KV cache. It only does the bookkeeping; the tensors belong to the runner.

The cache is one long row of token slots. A segment is a run of consecutive slots with a reference count. A sequence
occupies a chain of segments. Sequences share the segments of a common prefix, so that nothing is copied.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Segment:
    """Slots `start` to `start + capacity`, of which the first `used` hold tokens; `holders` is the reference count."""

    start: int
    capacity: int
    used: int = 0
    holders: int = 1


@dataclass(frozen=True)
class Piece:
    """The first `length` tokens of a segment, as part of one sequence."""

    segment: Segment
    length: int


Chain = tuple[Piece, ...]


def chain_length(chain: Iterable[Piece]) -> int:
    """Return the number of tokens in a chain."""
    return sum(piece.length for piece in chain)


def cut(chain: Sequence[Piece], length: int) -> Chain:
    """Return the first `length` tokens of a chain."""
    pieces = []
    for piece in chain:
        if length <= 0:
            break
        pieces.append(piece if piece.length <= length else Piece(piece.segment, length))
        length -= piece.length
    return tuple(pieces)


class KVCacheAllocator:
    """Allocates slots 1 to `size`. Slot 0 is a dummy: padding rows may write to it, and it is never allocated."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._gaps: list[tuple[int, int]] = [(1, size)]
        """Free runs as (start, length), sorted by start."""

    def take(self, count: int) -> list[Segment]:
        """Allocate `count` slots: one segment if a gap is large enough, otherwise several.

        Return an empty list if fewer slots are free.
        """
        if count > self.free or count <= 0:
            return []
        for i, (start, length) in enumerate(self._gaps):
            if length >= count:
                return [self._carve(i, start, length, count)]
        segments = []
        while count:
            i, (start, length) = max(enumerate(self._gaps), key=lambda gap: gap[1][1])
            segments.append(self._carve(i, start, length, min(count, length)))
            count -= segments[-1].capacity
        return segments

    def take_equal(self, count: int, each: int) -> list[Segment]:
        """Allocate `count` adjacent segments of `each` slots. Return an empty list if no gap is large enough."""
        run = next(
            (
                self._carve(i, start, length, count * each)
                for i, (start, length) in enumerate(self._gaps)
                if length >= count * each
            ),
            None,
        )
        return [Segment(run.start + i * each, each) for i in range(count)] if run else []

    def hold(self, chain: Iterable[Piece]) -> None:
        """Increment the reference count of each segment."""
        for piece in chain:
            piece.segment.holders += 1

    def release(self, segments: Iterable[Segment]) -> None:
        """Decrement the reference count of each segment, and free the segments that reach 0."""
        for segment in segments:
            segment.holders -= 1
            if not segment.holders:
                self._add_gap(segment.start, segment.capacity)
                segment.capacity = segment.used = 0

    def trim(self, segment: Segment) -> None:
        """Free the unused slots of a segment."""
        if segment.capacity > segment.used:
            self._add_gap(segment.start + segment.used, segment.capacity - segment.used)
            segment.capacity = segment.used

    def _carve(self, i: int, start: int, length: int, count: int) -> Segment:
        """Take the first `count` slots of gap `i`."""
        if length > count:
            self._gaps[i] = (start + count, length - count)
        else:
            del self._gaps[i]
        self.free -= count
        return Segment(start, count)

    def _add_gap(self, start: int, count: int) -> None:
        """Return a run of slots to the free list, merged with adjacent gaps."""
        if not count:
            return
        self.free += count
        insort(self._gaps, (start, count))
        i = self._gaps.index((start, count))
        if i + 1 < len(self._gaps) and start + count == self._gaps[i + 1][0]:
            count += self._gaps.pop(i + 1)[1]
            self._gaps[i] = (start, count)
        if i and sum(self._gaps[i - 1]) == start:
            self._gaps[i - 1] = (self._gaps[i - 1][0], self._gaps[i - 1][1] + count)
            del self._gaps[i]
