"""Decode attention over the KV cache in Triton. Each item's tokens are read once for all rows that share them.

There are two kernels: `_attend` computes a partial output and its log-sum-exp for each item, and `_merge` combines the
parts of a row (flash decoding: Dao et al. 2023; cascade attention: Juravsky et al. 2024, arXiv 2402.05099).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpo.backends.local.attention import Head
from tpo.backends.local.tables import MAX_PARTS

_TOKENS = 64


@triton.jit
def _attend(
    q, keys, values, table, items, item_count, positions, out, lse,
    scale, cap, kv_heads, slots, table_width,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, M)
    dk = tl.arange(0, KP)
    dv = tl.arange(0, VP)
    heads = kv_heads * GROUP
    count = tl.load(item_count) * kv_heads
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        item = items + (number // kv_heads) * 6
        kv_head = number % kv_heads
        row = tl.load(item) + m // GROUP
        used = m // GROUP < tl.load(item + 1)
        entries = table + tl.load(item + 2) * table_width
        begin = tl.load(item + 3)
        part = tl.load(item + 5)
        here = tl.load(positions + row, mask=used, other=-1)
        end = tl.minimum(tl.load(item + 4), tl.max(here, 0) + 1)
        if WINDOW > 0:
            first = tl.min(tl.where(used, here, 2147483647), 0) - WINDOW + 1
            begin = tl.maximum(begin, tl.maximum(first, 0).to(begin.dtype))
        head = kv_head * GROUP + m % GROUP
        at = (row * heads + head).to(tl.int64)
        query = tl.load(q + at[:, None] * K + dk[None, :], mask=used[:, None] & (dk[None, :] < K), other=0.0)
        base = kv_head.to(tl.int64) * slots
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, VP], tl.float32)
        for t in range(begin, end, N):
            there = t + tl.arange(0, N)
            inside = there < end
            slot = base + tl.load(entries + there, mask=inside, other=0).to(tl.int64)
            k = tl.load(keys + slot[:, None] * K + dk[None, :], mask=inside[:, None] & (dk[None, :] < K), other=0.0)
            s = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                s = cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)
            seen = inside[None, :] & (there[None, :] <= here[:, None])
            if WINDOW > 0:
                seen = seen & (there[None, :] > here[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp(s - safe[:, None])
            shrink = tl.exp(top - safe)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(values + slot[:, None] * V + dv[None, :], mask=inside[:, None] & (dv[None, :] < V), other=0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = new_top
        safe_total = tl.where(total > 0, total, 1.0)
        to = (row.to(tl.int64) * MOST + part) * heads + head
        tl.store(out + to[:, None] * V + dv[None, :], acc / safe_total[:, None], mask=used[:, None] & (dv[None, :] < V))
        tl.store(lse + to, top + tl.log(safe_total), mask=used)


@triton.jit
def _merge(
    out, lse, parts, result, V: tl.constexpr, VP: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    d = tl.arange(0, VP)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([VP], tl.float32)
    for part in range(tl.load(parts + row)):
        at = (row.to(tl.int64) * MOST + part) * heads + head
        weight = tl.load(lse + at)
        new_top = tl.maximum(top, weight)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - safe)
        share = tl.exp(weight - safe)
        acc = acc * shrink + share * tl.load(out + at * V + d, mask=d < V, other=0.0)
        total = total * shrink + share
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(result + (row * heads + head) * V + d, acc.to(result.dtype.element_ty), mask=d < V)


class Buffers:
    """Input and output buffers of the kernels, except keys and values. Their addresses are fixed for CUDA graphs."""

    def __init__(self, rows: int, tables: int, width: int, heads: int, size: int, items: int, device: torch.device):
        def integers(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.table = integers(tables, width)
        self.items, self.item_count = integers(items, 6), integers(1)
        self.positions, self.parts = integers(rows), integers(rows)
        self.out = torch.zeros(rows * MAX_PARTS * heads * size, dtype=torch.float32, device=device)
        self.lse = torch.zeros(rows * MAX_PARTS * heads, dtype=torch.float32, device=device)


def rows_per_item(group: int) -> int:
    """Return how many rows one item can serve, given the number of query heads per kv head."""
    return _queries(group) // group


def attend(q: Tensor, keys: Tensor, values: Tensor, head: Head, buffers: Buffers, programs: int) -> Tensor:
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
        q, keys, values, buffers.table, buffers.items, buffers.item_count, buffers.positions, buffers.out, buffers.lse,
        head.scale, head.cap or 1.0, kv_heads, slots, buffers.table.shape[1],
        WINDOW=head.window or 0, CAPPED=head.cap is not None, GROUP=group, M=_queries(group), N=_TOKENS,
        K=size, KP=triton.next_power_of_2(size), V=value_size, VP=wide, MOST=MAX_PARTS,
        num_warps=4, num_stages=3 if q.element_size() == 2 and size <= 128 else 2,
    )  # fmt: skip
    _merge[(rows, heads)](buffers.out, buffers.lse, buffers.parts, result, V=value_size, VP=wide, MOST=MAX_PARTS)
    return result


def _queries(group: int) -> int:
    """Return the number of queries of one item, rows times query heads per kv head, padded to a power of 2."""
    return int(max(16, min(64, triton.next_power_of_2(group * 8)), triton.next_power_of_2(group)))
