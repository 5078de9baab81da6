"""Which slots each row's tokens stand in, and how a step's attention is cut into equal work. Numbers alone, no torch.

The kernel takes items: a run of tokens of one row's table, for that row alone, or for the neighbours too that share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpo.backends.local.kv_allocator import chain_length
from tpo.backends.local.scheduler import ActiveSequence

PARTS = 16
"""Partial outputs that a row may have; they are merged afterwards."""
_SHORTEST, _LONGEST = 128, 1024

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Writes:
    """Entries of the table that change: flat indices and their slots."""

    at: Numbers
    slots: Numbers


@dataclass(frozen=True)
class Work:
    """A step's items, [items, 6]: first row, rows, table, begin, end, part; and each row's number of parts."""

    items: Numbers
    parts: Numbers


class Tables:
    """Table numbers of the running rows; `width` entries each."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.spare = rows
        """The table of nobody: all its entries are slot 0."""
        self._free = list(range(rows))
        self._known: dict[int, tuple[ActiveSequence, int]] = {}

    def update(self, rows: Sequence[ActiveSequence]) -> Writes | None:
        """Give new rows a table, take those of rows that left; what is to be written, None if nothing changed."""
        here = {id(row) for row in rows}
        left = [number for number, (row, _) in self._known.items() if id(row) not in here]
        for number in left:
            del self._known[number]
        self._free += left
        at, slots = [], []
        for row in rows:
            segments = self._known[row.table][1] if row.table in self._known else -1
            if segments == len(row.own):
                continue
            if segments < 0:
                row.table = self._free.pop()
            self._known[row.table] = (row, len(row.own))
            runs = _slots(row, max(segments, 0), with_prefix=segments < 0)
            begin = _capacity(row) - len(runs)
            at.append(np.arange(row.table * self.width + begin, row.table * self.width + begin + len(runs)))
            slots.append(runs)
        if at:
            return Writes(np.concatenate(at), np.concatenate(slots))
        return Writes(np.empty(0, np.int64), np.empty(0, np.int64)) if left else None

    def forget(self) -> None:
        """Every row is new again, and all of its slots are to be written."""
        for row, _ in self._known.values():
            row.table = -1
        self._free += self._known
        self._known.clear()


def work(rows: Sequence[ActiveSequence], rows_an_item: int, aim: int, most: int) -> Work:
    """Items for rows in this order: about `aim` of them where there is enough to do, never more than `most`.

    They reach to the end of what the rows have reserved; the kernel stops where the tokens do.
    """
    groups = _groups(rows)
    total = sum(chain_length(rows[a].prefix) for a, _ in groups) + sum(sum(s.capacity for s in r.own) for r in rows)
    longest = max(map(_capacity, rows))
    size = _SHORTEST
    while size < min(_LONGEST, total / aim) or size * (PARTS - 2) < longest:
        size *= 2
    while True:
        items, parts = _cut(rows, groups, rows_an_item, size)
        if len(items) <= most:
            return Work(np.array(items, np.int64), np.array(parts, np.int64))
        size *= 2


def _cut(
    rows: Sequence[ActiveSequence], groups: Sequence[tuple[int, int]], rows_an_item: int, size: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    items: list[tuple[int, ...]] = []
    parts = []
    for first, last in groups:
        shared = chain_length(rows[first].prefix)
        cuts = -(-shared // size)
        for a in range(first, last, rows_an_item):
            n = min(rows_an_item, last - a)
            items += [(a, n, rows[a].table, i * size, min(shared, (i + 1) * size), i) for i in range(cuts)]
        for i in range(first, last):
            end = _capacity(rows[i])
            own = [(i, 1, rows[i].table, b, min(end, b + size)) for b in range(shared, end, size)]
            items += [(*item, cuts + j) for j, item in enumerate(own)]
            parts.append(cuts + len(own))
    return items, parts


def _groups(rows: Sequence[ActiveSequence]) -> list[tuple[int, int]]:
    """Neighbours with one prompt, as (first, last)."""
    edges = [i for i in range(1, len(rows)) if rows[i].prefix is not rows[i - 1].prefix]
    return list(zip([0, *edges], [*edges, len(rows)], strict=True))


def _capacity(row: ActiveSequence) -> int:
    return chain_length(row.prefix) + sum(segment.capacity for segment in row.own)


def _slots(row: ActiveSequence, first_segment: int, *, with_prefix: bool) -> Numbers:
    runs = [(p.segment.start, p.length) for p in row.prefix] if with_prefix else []
    runs += [(s.start, s.capacity) for s in row.own[first_segment:]]
    return np.concatenate([np.arange(start, start + length) for start, length in runs])
