"""Who holds which part of the memory for keys and values. Counts tokens; the tensors are the runner's.

The arena is one long row of token slots. A segment is a run of neighbouring slots with a count of its holders; a chain
of segments is what a sequence has in the cache, so that sequences share what they have in common and nothing is copied.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Segment:
    """Slots `start` to `start + capacity`, of which the first `used` hold tokens."""

    start: int
    capacity: int
    used: int = 0
    holders: int = 1


@dataclass(frozen=True)
class Piece:
    """The first `length` tokens of a segment, as one sequence sees it."""

    segment: Segment
    length: int


Chain = tuple[Piece, ...]


def chain_length(chain: Iterable[Piece]) -> int:
    """Tokens that a chain holds."""
    return sum(piece.length for piece in chain)


def cut(chain: Sequence[Piece], length: int) -> Chain:
    """The first `length` tokens of a chain."""
    pieces = []
    for piece in chain:
        if length <= 0:
            break
        pieces.append(piece if piece.length <= length else Piece(piece.segment, length))
        length -= piece.length
    return tuple(pieces)


class KVCacheAllocator:
    """Slots 1 to `size`; slot 0 is nobody's and may be written by anyone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._gaps: list[tuple[int, int]] = [(1, size)]
        """Free runs (start, length), by start."""

    def take(self, count: int) -> list[Segment]:
        """New segments of `count` slots together: one where there is such a gap; none when fewer slots are free."""
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
        """`count` segments of `each` slots that stand side by side; none when there is no such gap."""
        whole = next(
            (
                self._carve(i, start, length, count * each)
                for i, (start, length) in enumerate(self._gaps)
                if length >= count * each
            ),
            None,
        )
        return [Segment(whole.start + i * each, each) for i in range(count)] if whole else []

    def hold(self, chain: Iterable[Piece]) -> None:
        """One holder more for each segment."""
        for piece in chain:
            piece.segment.holders += 1

    def release(self, segments: Iterable[Segment]) -> None:
        """One holder fewer; what nobody holds is free again."""
        for segment in segments:
            segment.holders -= 1
            if not segment.holders:
                self._put(segment.start, segment.capacity)
                segment.capacity = segment.used = 0

    def trim(self, segment: Segment) -> None:
        """Free the slots that its tokens do not need."""
        if segment.capacity > segment.used:
            self._put(segment.start + segment.used, segment.capacity - segment.used)
            segment.capacity = segment.used

    def _carve(self, i: int, start: int, length: int, count: int) -> Segment:
        if length > count:
            self._gaps[i] = (start + count, length - count)
        else:
            del self._gaps[i]
        self.free -= count
        return Segment(start, count)

    def _put(self, start: int, count: int) -> None:
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
