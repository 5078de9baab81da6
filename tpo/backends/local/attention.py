"""Attention over the KV cache, installed in a model through transformers' AttentionInterface.

The model computes queries, keys and values of a step's new tokens. This module writes the keys and values into the
cache, and lets each query attend to the cached tokens of its sequence. Lengths are exact and there is no padding, so a
row's result does not depend on the other rows of the batch. Parts of a sequence are attended to separately, and their
outputs are merged by their log-sum-exp. So a prompt is read once for all its samples (cascade attention: Juravsky et
al. 2024, arXiv 2402.05099).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from tpo.backends.local.kv_allocator import SegmentSlice, truncate
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk

IMPLEMENTATION = "tpo"
"""Name of this implementation in transformers."""

_MAX_SCORES = 2**25
"""Maximum number of attention scores in memory (128 MiB) if no kernel computes attention without storing them."""


@dataclass(frozen=True)
class AttentionParams:
    """Attention parameters of one layer: scale, sliding window in tokens, and soft cap of the scores."""

    scale: float
    window: int | None
    softcap: float | None


class AttentionStep(Protocol):
    """Attention of one forward pass over its sequences."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Compute the attention of one layer.

        Queries: [heads, tokens, size]. Keys and values: [kv heads, tokens, size]. Output: [tokens, heads, size].
        """
        ...


_current = threading.local()


class attention_step:  # noqa: N801
    """Context manager: within `with attention_step(step):`, forward passes of this thread use the step's attention."""

    def __init__(self, step: AttentionStep) -> None:
        self._step = step

    def __enter__(self) -> None:
        _current.step = self._step

    def __exit__(self, *_: object) -> None:
        _current.step = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers. Raises NotImplementedError if the attention is not plainly causal."""
    if attention_mask is not None or s_aux is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention is not plainly causal (it has own masks, sinks, or is bidirectional)")
    params = AttentionParams(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or None, softcap or None
    )
    out: Tensor = _current.step.attend(module.layer_idx, query[0], key[0], value[0], params)
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attention)


class KVCache:
    """Keys and values of every layer, each [kv heads, slots, size]. Slot 0 is a dummy."""

    def __init__(self, shapes: dict[int, tuple[int, int, int]], slots: int, dtype: torch.dtype, device: torch.device):
        self.slots = slots + 1
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer, (heads, key_size, value_size) in shapes.items():
            # On CPU, memory pages that are never written cost nothing.
            self.keys[layer] = torch.empty(heads, self.slots, key_size, dtype=dtype, device=device)
            self.values[layer] = torch.empty(heads, self.slots, value_size, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values [kv heads, tokens, size] into their slots."""
        self.keys[layer].index_copy_(1, slots, k)
        self.values[layer].index_copy_(1, slots, v)


class PrefillAttention:
    """Prefill: chunks of several prompts, packed into one row of tokens."""

    def __init__(self, cache: KVCache, chunks: Sequence[PrefillChunk], device: torch.device) -> None:
        self._cache = cache
        self._chunks = chunks
        runs = [_slot_runs(chunk.prefill.chain, chunk.begin, chunk.end) for chunk in chunks]
        self.slots = torch.cat([torch.arange(a, b) for run in runs for a, b in run]).to(device)
        self.positions = torch.cat([torch.arange(chunk.begin, chunk.end) for chunk in chunks]).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Let each chunk attend causally to the earlier tokens of its prompt and to itself."""
        self._cache.write(layer, self.slots, k, v)
        outputs, offset = [], 0
        for chunk in self._chunks:
            part = slice(offset, offset + chunk.end - chunk.begin)
            offset = part.stop
            first = max(0, chunk.begin - params.window + 1) if params.window else 0
            before = _slot_runs(chunk.prefill.chain, first, chunk.begin)
            keys = _concatenate(self._cache.keys[layer], before, k[:, part])
            values = _concatenate(self._cache.values[layer], before, v[:, part])
            outputs.append(causal_attention(q[:, part], keys, values, params).transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class DecodeAttention:
    """Decode: one token for each row, using only torch."""

    def __init__(self, cache: KVCache, rows: Sequence[ActiveSequence], device: torch.device) -> None:
        self._cache = cache
        self._rows = rows
        self._calls: dict[int | None, list[list[_AttentionCall]]] = {}
        """The attention calls for each window size, by level."""
        self.slots = torch.tensor([row.slot for row in rows], device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Let each row attend to all its tokens, or to the last `window` of them."""
        self._cache.write(layer, self.slots, k, v)
        if params.window not in self._calls:
            self._calls[params.window] = _plan_calls(self._rows, params.window)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        kv_heads, rows = keys.shape[0], q.shape[1]
        queries = q.transpose(0, 1).reshape(rows, kv_heads, -1, q.shape[2])
        by_head = queries.transpose(0, 1).reshape(1, kv_heads, -1, q.shape[2])
        group, size = queries.shape[2], values.shape[2]
        # The cost is the number of tensor calls: use few for each part, and do the rest once for a level.
        all_keys, all_values = keys.unsqueeze(0), values.unsqueeze(0)
        outputs, weights = [], []
        for calls in self._calls[params.window]:
            covers_all = calls[0].first == 0 and sum(call.rows for call in calls) == rows
            parts = []
            for call in calls:
                if call.shared:
                    part = by_head.narrow(2, call.first * group, call.rows * group)
                    shared_keys = all_keys.narrow(2, call.start, call.length)
                    shared_values = all_values.narrow(2, call.start, call.length)
                    parts.append(full_attention(part, shared_keys, shared_values, params))
                else:
                    part = queries.narrow(0, call.first, call.rows)
                    parts.append(full_attention(part, call.view(keys), call.view(values), params))
            dimension = 2 if calls[0].shared else 0
            out, lse = (torch.cat(tensors, dimension) for tensors in zip(*parts, strict=True))
            if calls[0].shared:
                out = out.view(kv_heads, -1, group, size).transpose(0, 1)
                lse = lse.view(kv_heads, -1, group).transpose(0, 1)
            if not covers_all:
                indices = torch.cat([torch.arange(call.first, call.first + call.rows) for call in calls]).to(q.device)
                out = out.new_zeros(rows, kv_heads, group, size).index_copy_(0, indices, out)
                lse = lse.new_full((rows, kv_heads, group), -torch.inf).index_copy_(0, indices, lse)
            outputs.append(out)
            weights.append(lse)
        return merge_partial_outputs(outputs, weights).to(q.dtype).reshape(rows, -1, size)


@dataclass(frozen=True)
class _AttentionCall:
    """One run of slots for `rows` rows starting at `first`.

    If `shared`, all rows use the same run. Otherwise each row has its own run, at equal distances.
    """

    first: int
    rows: int
    start: int
    length: int
    shared: bool
    distance: int = 0

    def view(self, stored: Tensor) -> Tensor:
        """View the rows' own runs of [kv heads, slots, size] as [rows, kv heads, length, size], without a copy."""
        heads, slots, size = stored.shape
        return stored.as_strided(
            (self.rows, heads, self.length, size),
            (self.distance * size, slots * size, size, 1),
            self.start * size,
        )


def _plan_calls(rows: Sequence[ActiveSequence], window: int | None) -> list[list[_AttentionCall]]:
    """Plan the attention calls of a decode step: each prompt once for its adjacent rows, then each row's own tokens.

    Each level covers another part of the rows' tokens. Its calls are ordered by row, and either all shared or all not.
    """
    shared: list[list[_AttentionCall]] = []
    own: list[list[_AttentionCall]] = []
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and _share_prefix(rows[first], rows[last], window):
            last += 1
        runs = _slot_runs(rows[first].prefix, _window_start(rows[first], window), rows[first].position + 1)
        _append_to_levels(shared, [_AttentionCall(first, last - first, a, b - a, True) for a, b in runs])
        at = first
        while at < last:
            end = _aligned_until(rows, at, last)
            _append_to_levels(own, _own_calls(rows, at, end, window))
            at = end
        first = last
    return shared + own


def _append_to_levels(levels: list[list[_AttentionCall]], calls: list[_AttentionCall]) -> None:
    """Append the i-th call to the i-th level; add levels as needed."""
    levels += [[] for _ in range(len(calls) - len(levels))]
    for level, call in zip(levels, calls, strict=False):
        level.append(call)


def _own_calls(rows: Sequence[ActiveSequence], first: int, last: int, window: int | None) -> list[_AttentionCall]:
    """Return the calls for the own segments of rows `first` to `last`, which are aligned."""
    row = rows[first]
    begin = max(0, _window_start(row, window) - (row.position + 1 - len(row.tokens)))
    calls: list[_AttentionCall] = []
    for i, segment in enumerate(row.segments):
        length = segment.used - begin
        if length > 0:
            distance = rows[first + 1].segments[i].start - segment.start if last > first + 1 else 0
            calls.append(_AttentionCall(first, last - first, segment.start + begin, length, False, distance))
        begin = max(0, begin - segment.used)
    return calls


def _window_start(row: ActiveSequence, window: int | None) -> int:
    return max(0, row.position - window + 1) if window else 0


def _share_prefix(a: ActiveSequence, b: ActiveSequence, window: int | None) -> bool:
    return a.prefix is b.prefix and (not window or a.position == b.position)


def _aligned_until(rows: Sequence[ActiveSequence], first: int, last: int) -> int:
    """Return the end of the rows whose own segments lie at equal distances and hold equally many tokens."""
    a, end = rows[first], first + 1
    distances: list[int] = []
    while end < last:
        before, b = rows[end - 1], rows[end]
        if len(b.segments) != len(a.segments) or len(b.tokens) != len(a.tokens):
            break
        pairs = list(zip(before.segments, b.segments, strict=True))
        distances = distances or [y.start - x.start for x, y in pairs]
        if min(distances) <= 0 or any(
            y.start - x.start != d or y.used != x.used for d, (x, y) in zip(distances, pairs, strict=True)
        ):
            break
        end += 1
    return end


def _slot_runs(chain: Sequence[SegmentSlice], begin: int, end: int) -> list[tuple[int, int]]:
    """Return the slots of the tokens `begin` to `end` of a chain, as runs (from, to); adjacent runs are joined."""
    runs: list[tuple[int, int]] = []
    at = 0
    for part in truncate(chain, end):
        a, b = max(begin - at, 0), part.length
        at += b
        if a < b:
            a, b = part.segment.start + a, part.segment.start + b
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
    return runs


def _concatenate(stored: Tensor, runs: Sequence[tuple[int, int]], new: Tensor) -> Tensor:
    """Concatenate the stored runs and the new tokens."""
    return torch.cat([*(stored[:, a:b] for a, b in runs), new], 1) if runs else new


def merge_partial_outputs(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Merge outputs [..., size] over disjoint parts into the output over all of them.

    `weights`: the log-sum-exp of the scores of each part.
    """
    if len(outputs) == 1:
        return outputs[0]
    share = torch.softmax(torch.stack(tuple(weights)).float(), 0).unsqueeze(-1)
    return (torch.stack(tuple(outputs)) * share).sum(0)


def full_attention(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Compute attention without a mask: every query [b, heads, n, size] to every key [b, heads, m, size].

    Return the output and the log-sum-exp of the scores.
    """
    if q.device.type == "cpu" and params.softcap is None and k.shape[-1] == v.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, False, scale=params.scale
        )
        return out, lse
    scores = _scores(q, k, params)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v.float(), lse.squeeze(-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Compute causal attention: queries [heads, n, size] are the last n of the m tokens of the keys.

    Keys and values: [kv heads, m, size]. Return the output, with the shape of q.
    """
    n, m = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    plain = params.softcap is None and k.shape[-1] == v.shape[-1]
    if plain and not params.window and _flash_supports(q[None], k[None], v[None]):
        # Its causal mask is aligned to the end of the keys, as needed here.
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            q[None], k[None], v[None], 0.0, True, False, scale=params.scale
        )
        return out[0][0]  # type: ignore[no-any-return]
    if group > 1:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if plain:
        mask = _causal_mask(n, m, params.window, q.device) if m > n or params.window else None
        return functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=params.scale
        )[0]
    outputs = []
    step = max(1, _MAX_SCORES // (q.shape[0] * m))
    for begin in range(0, n, step):
        part = q[:, begin : begin + step]
        end = m - n + begin + part.shape[1]
        mask = _causal_mask(part.shape[1], end, params.window, q.device)
        scores = _scores(part, k[:, :end], params).masked_fill(~mask, -torch.inf)
        outputs.append((scores.softmax(-1) @ v[:, :end].float()).to(q.dtype))
    return torch.cat(outputs, 1)


def _flash_supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether torch's flash attention supports these tensors: it depends on dtype, head size and GPU."""
    shared = q.shape[1] != k.shape[1]
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, shared)
    return q.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params)


def _scores(q: Tensor, k: Tensor, params: AttentionParams) -> Tensor:
    """Return scaled attention scores in float32, soft-capped if the layer has a cap."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * params.scale
    return params.softcap * torch.tanh(scores / params.softcap) if params.softcap else scores


def _causal_mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask [n, m] that is True where a query may attend to a key."""
    query = torch.arange(m - n, m, device=device).unsqueeze(1)
    key = torch.arange(m, device=device)
    mask = key <= query
    return mask & (key > query - window) if window else mask
