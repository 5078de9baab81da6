"""Slot tables of the running rows, and the split of a step's attention into work items. Uses numpy, not torch.

A work item is a run of tokens in one row's table. It is computed for that row only, or also for adjacent rows that
share the same prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpo.backends.local.kv_allocator import chain_length
from tpo.backends.local.scheduler import ActiveSequence

MAX_PARTS = 16
"""Maximum number of partial outputs per row; they are merged afterwards."""
_SHORTEST, _LONGEST = 128, 1024

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Writes:
    """Changed entries of the tables: flat indices and their new slots."""

    at: Numbers
    slots: Numbers


@dataclass(frozen=True)
class Work:
    """Work items of a step.

    `items`: [items, 6] with first row, rows, table, begin, end, part. `parts`: the number of parts of each row.
    """

    items: Numbers
    parts: Numbers


class Tables:
    """Assigns table indices to the running rows; each table has `width` entries."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.null_table = rows
        """Index of a table whose entries are all slot 0, used by padding rows."""
        self._free = list(range(rows))
        self._known: dict[int, tuple[ActiveSequence, int]] = {}

    def update(self, rows: Sequence[ActiveSequence]) -> Writes | None:
        """Assign tables to new rows and free those of rows that left.

        Return the table entries to write, or None if nothing changed.
        """
        current = {id(row) for row in rows}
        left = [number for number, (row, _) in self._known.items() if id(row) not in current]
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
        """Free all tables; the next update writes every row again."""
        for row, _ in self._known.values():
            row.table = -1
        self._free += self._known
        self._known.clear()


def work(rows: Sequence[ActiveSequence], rows_an_item: int, aim: int, most: int) -> Work:
    """Split the attention of rows, in this order, into work items.

    There are about `aim` items if there is enough work, and never more than `most`. The items cover all reserved slots
    of a row; the kernel stops at the last token.
    """
    groups = _groups(rows)
    total = sum(chain_length(rows[a].prefix) for a, _ in groups) + sum(sum(s.capacity for s in r.own) for r in rows)
    longest = max(map(_capacity, rows))
    size = _SHORTEST
    while size < min(_LONGEST, total / aim) or size * (MAX_PARTS - 2) < longest:
        size *= 2
    while True:
        items, parts = _cut(rows, groups, rows_an_item, size)
        if len(items) <= most:
            return Work(np.array(items, np.int64), np.array(parts, np.int64))
        size *= 2


def _cut(
    rows: Sequence[ActiveSequence], groups: Sequence[tuple[int, int]], rows_an_item: int, size: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Cut the rows into items of at most `size` tokens. Return the items and each row's number of parts."""
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
    """Return runs of adjacent rows with the same prompt, as (first, last)."""
    edges = [i for i in range(1, len(rows)) if rows[i].prefix is not rows[i - 1].prefix]
    return list(zip([0, *edges], [*edges, len(rows)], strict=True))


def _capacity(row: ActiveSequence) -> int:
    """Return the number of slots of a row, prompt included."""
    return chain_length(row.prefix) + sum(segment.capacity for segment in row.own)


def _slots(row: ActiveSequence, first_segment: int, *, with_prefix: bool) -> Numbers:
    """Return the slots of a row, in order, from one of its own segments on."""
    runs = [(p.segment.start, p.length) for p in row.prefix] if with_prefix else []
    runs += [(s.start, s.capacity) for s in row.own[first_segment:]]
    return np.concatenate([np.arange(start, start + length) for start, length in runs])
