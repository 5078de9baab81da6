"""Slot tables of the running sequences, and the split of decode attention into work items.

A slot table lists the cache slots of one sequence, in the order of its tokens. A row is the index of a sequence in the
batch. A work item is a run of tokens in one table. It is computed for one row, or for adjacent rows with the same
prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpo.backends.local.kv_allocator import chain_length
from tpo.backends.local.scheduler import ActiveSequence

MAX_PARTS = 16
"""Maximum number of partial outputs per row; they are merge_partial_outputs afterwards."""
_MIN_ITEM_TOKENS, _MAX_ITEM_TOKENS = 128, 1024

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TableWrites:
    """Changed entries of the tables: flat indices and their new slots."""

    indices: Int64Array
    slots: Int64Array


@dataclass(frozen=True)
class WorkItems:
    """Work items of a step.

    `items`: [items, 6] with first row, rows, table, begin, end, part. `part_counts`: the number of parts of each row.
    """

    items: Int64Array
    part_counts: Int64Array


class SlotTables:
    """Assigns a table to each running sequence; each table has `width` entries."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.null_table = rows
        """Index of a table whose entries are all slot 0, used by padding rows."""
        self._free = list(range(rows))
        self._assigned: dict[int, tuple[ActiveSequence, int]] = {}
        """For each table in use, its row and how many of the row's segments it contains."""

    def update(self, rows: Sequence[ActiveSequence]) -> TableWrites | None:
        """Assign tables to new rows and free the tables of rows that left the batch.

        Return the table entries to write, or None if nothing changed.
        """
        current = {id(row) for row in rows}
        left = [number for number, (row, _) in self._assigned.items() if id(row) not in current]
        for number in left:
            del self._assigned[number]
        self._free += left
        indices, slots = [], []
        for row in rows:
            written = self._assigned[row.table_index][1] if row.table_index in self._assigned else -1
            if written == len(row.segments):
                continue
            if written < 0:
                row.table_index = self._free.pop()
            self._assigned[row.table_index] = (row, len(row.segments))
            runs = _slots(row, max(written, 0), with_prefix=written < 0)
            begin = _capacity(row) - len(runs)
            indices.append(
                np.arange(row.table_index * self.width + begin, row.table_index * self.width + begin + len(runs))
            )
            slots.append(runs)
        if indices:
            return TableWrites(np.concatenate(indices), np.concatenate(slots))
        return TableWrites(np.empty(0, np.int64), np.empty(0, np.int64)) if left else None

    def clear(self) -> None:
        """Free all tables; the next update writes every row again."""
        for row, _ in self._assigned.values():
            row.table_index = -1
        self._free += self._assigned
        self._assigned.clear()


def plan_work_items(rows: Sequence[ActiveSequence], rows_per_item: int, target_items: int, max_items: int) -> WorkItems:
    """Split the attention of rows, in this order, into work items.

    There are about `target_items` items if there are enough tokens, and never more than `max_items`. The items cover
    all reserved slots of a row; the kernel stops at the last token.
    """
    groups = _groups(rows)
    total = sum(chain_length(rows[a].prefix) for a, _ in groups) + sum(
        sum(s.capacity for s in r.segments) for r in rows
    )
    longest = max(map(_capacity, rows))
    size = _MIN_ITEM_TOKENS
    while size < min(_MAX_ITEM_TOKENS, total / target_items) or size * (MAX_PARTS - 2) < longest:
        size *= 2
    while True:
        items, parts = _split(rows, groups, rows_per_item, size)
        if len(items) <= max_items:
            return WorkItems(np.array(items, np.int64), np.array(parts, np.int64))
        size *= 2


def _split(
    rows: Sequence[ActiveSequence], groups: Sequence[tuple[int, int]], rows_per_item: int, size: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Cut the rows into items of at max_items `size` tokens. Return the items and each row's number of parts."""
    items: list[tuple[int, ...]] = []
    parts = []
    for first, last in groups:
        shared = chain_length(rows[first].prefix)
        cuts = -(-shared // size)
        for a in range(first, last, rows_per_item):
            n = min(rows_per_item, last - a)
            items += [(a, n, rows[a].table_index, i * size, min(shared, (i + 1) * size), i) for i in range(cuts)]
        for i in range(first, last):
            end = _capacity(rows[i])
            own = [(i, 1, rows[i].table_index, b, min(end, b + size)) for b in range(shared, end, size)]
            items += [(*item, cuts + j) for j, item in enumerate(own)]
            parts.append(cuts + len(own))
    return items, parts


def _groups(rows: Sequence[ActiveSequence]) -> list[tuple[int, int]]:
    """Return runs of adjacent rows with the same prompt, as (first, last)."""
    edges = [i for i in range(1, len(rows)) if rows[i].prefix is not rows[i - 1].prefix]
    return list(zip([0, *edges], [*edges, len(rows)], strict=True))


def _capacity(row: ActiveSequence) -> int:
    """Return the number of slots of a row, prompt included."""
    return chain_length(row.prefix) + sum(segment.capacity for segment in row.segments)


def _slots(row: ActiveSequence, first_segment: int, *, with_prefix: bool) -> Int64Array:
    """Return the slots of a row, in order, from one of its own segments on."""
    runs = [(p.segment.start, p.length) for p in row.prefix] if with_prefix else []
    runs += [(s.start, s.capacity) for s in row.segments[first_segment:]]
    return np.concatenate([np.arange(start, start + length) for start, length in runs])
