"""Decode attention over the KV cache in Triton. Each item's tokens are read once for all rows that share them.

There are two kernels: `_attend` computes a partial output and its log-sum-exp for each item, and `_merge` combines the
parts of a row (flash decoding: Dao et al. 2023; cascade attention: Juravsky et al. 2024, arXiv 2402.05099).

Names in the kernels: K and V are the sizes of keys and values, KP and VP the same padded to powers of 2, M the queries
of an item and N the tokens of a tile. `row_max`, `row_sum` and `rescale` are those of the online softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpo.backends.local.attention import AttentionParams
from tpo.backends.local.tables import MAX_PARTS

_TILE_TOKENS = 64
"""Tokens of a work item that are loaded at once."""


@triton.jit
def _attend(
    q, keys, values, tables, items, item_count, positions, out, lse,
    scale, softcap, kv_heads, slots, table_width,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, M)
    dk = tl.arange(0, KP)
    dv = tl.arange(0, VP)
    heads = kv_heads * GROUP
    work_count = tl.load(item_count) * kv_heads
    for work_index in range(tl.program_id(0), work_count, tl.num_programs(0)):
        item = items + (work_index // kv_heads) * 6
        kv_head = work_index % kv_heads
        row = tl.load(item) + m // GROUP
        row_mask = m // GROUP < tl.load(item + 1)
        slot_table = tables + tl.load(item + 2) * table_width
        begin = tl.load(item + 3)
        part = tl.load(item + 5)
        query_position = tl.load(positions + row, mask=row_mask, other=-1)
        end = tl.minimum(tl.load(item + 4), tl.max(query_position, 0) + 1)
        if WINDOW > 0:
            first = tl.min(tl.where(row_mask, query_position, 2147483647), 0) - WINDOW + 1
            begin = tl.maximum(begin, tl.maximum(first, 0).to(begin.dtype))
        head = kv_head * GROUP + m % GROUP
        at = (row * heads + head).to(tl.int64)
        query = tl.load(q + at[:, None] * K + dk[None, :], mask=row_mask[:, None] & (dk[None, :] < K), other=0.0)
        base = kv_head.to(tl.int64) * slots
        row_max = tl.full([M], float("-inf"), tl.float32)
        row_sum = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, VP], tl.float32)
        for t in range(begin, end, N):
            key_position = t + tl.arange(0, N)
            key_mask = key_position < end
            slot = base + tl.load(slot_table + key_position, mask=key_mask, other=0).to(tl.int64)
            k = tl.load(keys + slot[:, None] * K + dk[None, :], mask=key_mask[:, None] & (dk[None, :] < K), other=0.0)
            s = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
            visible = key_mask[None, :] & (key_position[None, :] <= query_position[:, None])
            if WINDOW > 0:
                visible = visible & (key_position[None, :] > query_position[:, None] - WINDOW)
            s = tl.where(visible, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp(s - safe_max[:, None])
            rescale = tl.exp(row_max - safe_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v = tl.load(values + slot[:, None] * V + dv[None, :], mask=key_mask[:, None] & (dv[None, :] < V), other=0.0)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            row_max = new_max
        safe_sum = tl.where(row_sum > 0, row_sum, 1.0)
        to = (row.to(tl.int64) * PARTS + part) * heads + head
        out_mask = row_mask[:, None] & (dv[None, :] < V)
        tl.store(out + to[:, None] * V + dv[None, :], acc / safe_sum[:, None], mask=out_mask)
        tl.store(lse + to, row_max + tl.log(safe_sum), mask=row_mask)


@triton.jit
def _merge(
    out, lse, parts, result, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    d = tl.arange(0, VP)
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros([VP], tl.float32)
    for part in range(tl.load(parts + row)):
        at = (row.to(tl.int64) * PARTS + part) * heads + head
        part_lse = tl.load(lse + at)
        new_max = tl.maximum(row_max, part_lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp(row_max - safe_max)
        weight = tl.exp(part_lse - safe_max)
        acc = acc * rescale + weight * tl.load(out + at * V + d, mask=d < V, other=0.0)
        row_sum = row_sum * rescale + weight
        row_max = new_max
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)
    tl.store(result + (row * heads + head) * V + d, acc.to(result.dtype.element_ty), mask=d < V)


class Buffers:
    """Input and output buffers of the kernels, except keys and values. Their addresses are fixed for CUDA graphs."""

    def __init__(self, rows: int, tables: int, width: int, heads: int, size: int, items: int, device: torch.device):
        def integers(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.tables = integers(tables, width)
        self.items, self.item_count = integers(items, 6), integers(1)
        self.positions, self.part_counts = integers(rows), integers(rows)
        self.out = torch.zeros(rows * MAX_PARTS * heads * size, dtype=torch.float32, device=device)
        self.lse = torch.zeros(rows * MAX_PARTS * heads, dtype=torch.float32, device=device)


def rows_per_item(group: int) -> int:
    """Return how many rows one item can serve, given the number of query heads per kv head."""
    return _queries(group) // group


def attend(q: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, buffers: Buffers, programs: int) -> Tensor:
    """Compute decode attention with the work items in the buffers.

    Queries: [heads, rows, size]. Keys and values: [kv heads, slots, size]. Output: [rows, heads, size].
    """
    q = q.transpose(0, 1).contiguous()
    rows, heads, size = q.shape
    kv_heads, slots, value_size = values.shape
    group = heads // kv_heads
    result = torch.empty(rows, heads, value_size, dtype=q.dtype, device=q.device)
    wide = triton.next_power_of_2(value_size)
    _attend[(programs,)](
        q, keys, values, buffers.tables, buffers.items, buffers.item_count, buffers.positions, buffers.out, buffers.lse,
        params.scale, params.softcap or 1.0, kv_heads, slots, buffers.tables.shape[1],
        WINDOW=params.window or 0, CAPPED=params.softcap is not None, GROUP=group, M=_queries(group), N=_TILE_TOKENS,
        K=size, KP=triton.next_power_of_2(size), V=value_size, VP=wide, PARTS=MAX_PARTS,
        num_warps=4, num_stages=3 if q.element_size() == 2 and size <= 128 else 2,
    )  # fmt: skip
    _merge[(rows, heads)](buffers.out, buffers.lse, buffers.part_counts, result, V=value_size, VP=wide, PARTS=MAX_PARTS)
    return result


def _queries(group: int) -> int:
    """Return the number of queries of one item, rows times query heads per kv head, padded to a power of 2."""
    return int(max(16, min(64, triton.next_power_of_2(group * 8)), triton.next_power_of_2(group)))
