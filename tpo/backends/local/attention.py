"""Attention over the arena, put in the place of a model's own by transformers' AttentionInterface.

The model computes queries, keys and values of the step's new tokens; what is here writes the keys and values into the
arena and lets the queries look at all that their sequences have there. Exact lengths and no padding: what a row sees
does not depend on its company. Parts of a sequence are attended to on their own and merged by their log-sum-exp, so a
prompt is read once for all its samples (cascade attention: Juravsky et al. 2024, arXiv 2402.05099).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from tpo.backends.local.kv_allocator import Piece, cut
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk

NAME = "tpo"

_MOST_SCORES = 2**25
"""Scores that are held at once where no kernel does without holding them: 128 MiB, however long the prompt."""


@dataclass(frozen=True)
class Head:
    """How one layer looks: what the model hands to its attention beside the tensors."""

    scale: float
    window: int | None
    cap: float | None


class Step(Protocol):
    """The sequences of one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
        """Queries [heads, tokens, size], keys and values [kv heads, tokens, size]: the output [tokens, heads, size]."""
        ...


_current = threading.local()


class using:  # noqa: N801
    """`with using(step):` this thread's forward passes run over the step's sequences."""

    def __init__(self, step: Step) -> None:
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
    if attention_mask is not None or s_aux is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention is not plainly causal (masks of its own, sinks, or both directions)")
    head = Head(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or None, softcap or None)
    out: Tensor = _current.step.attend(module.layer_idx, query[0], key[0], value[0], head)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


class KVCache:
    """Keys and values of every layer, [kv heads, slots, size]."""

    def __init__(self, shapes: dict[int, tuple[int, int, int]], slots: int, dtype: torch.dtype, device: torch.device):
        self.slots = slots + 1
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer, (heads, key_size, value_size) in shapes.items():
            # On CPU, pages of memory that are never written cost nothing.
            self.keys[layer] = torch.empty(heads, self.slots, key_size, dtype=dtype, device=device)
            self.values[layer] = torch.empty(heads, self.slots, value_size, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keys and values [kv heads, tokens, size] into their slots."""
        self.keys[layer].index_copy_(1, slots, k)
        self.values[layer].index_copy_(1, slots, v)


class PrefillStep:
    """Parts of several prompts in one row of tokens."""

    def __init__(self, store: KVCache, chunks: Sequence[PrefillChunk], device: torch.device) -> None:
        self._store = store
        self._chunks = chunks
        runs = [_runs(chunk.reading.chain, chunk.begin, chunk.end) for chunk in chunks]
        self.slots = torch.cat([torch.arange(a, b) for run in runs for a, b in run]).to(device)
        self.positions = torch.cat([torch.arange(chunk.begin, chunk.end) for chunk in chunks]).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
        """Each part sees what stands before it in its own prompt, and itself."""
        self._store.write(layer, self.slots, k, v)
        outputs, at = [], 0
        for chunk in self._chunks:
            part = slice(at, at + chunk.end - chunk.begin)
            at = part.stop
            first = max(0, chunk.begin - head.window + 1) if head.window else 0
            before = _runs(chunk.reading.chain, first, chunk.begin)
            keys = _joined(self._store.keys[layer], before, k[:, part])
            values = _joined(self._store.values[layer], before, v[:, part])
            outputs.append(causal(q[:, part], keys, values, head).transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class DecodeStep:
    """One token for each row; the way that needs torch alone."""

    def __init__(self, store: KVCache, rows: Sequence[ActiveSequence], device: torch.device) -> None:
        self._store = store
        self._rows = rows
        self._calls: dict[int | None, list[list[_Call]]] = {}
        """What is looked at for each window, by level."""
        self.slots = torch.tensor([row.slot for row in rows], device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
        """Each row sees all that it has, or its last `window` tokens."""
        self._store.write(layer, self.slots, k, v)
        if head.window not in self._calls:
            self._calls[head.window] = _calls(self._rows, head.window)
        keys, values = self._store.keys[layer], self._store.values[layer]
        kv_heads, rows = keys.shape[0], q.shape[1]
        queries = q.transpose(0, 1).reshape(rows, kv_heads, -1, q.shape[2])
        of_heads = queries.transpose(0, 1).reshape(1, kv_heads, -1, q.shape[2])
        group, size = queries.shape[2], values.shape[2]
        # Tensor calls are what this costs: few of them for each part, and the rest once for a level.
        keys_of_all, values_of_all = keys.unsqueeze(0), values.unsqueeze(0)
        outputs, weights = [], []
        for calls in self._calls[head.window]:
            whole = calls[0].first == 0 and sum(call.rows for call in calls) == rows
            parts = []
            for call in calls:
                if call.shared:
                    mine = of_heads.narrow(2, call.first * group, call.rows * group)
                    seen = keys_of_all.narrow(2, call.start, call.length)
                    parts.append(attend_all(mine, seen, values_of_all.narrow(2, call.start, call.length), head))
                else:
                    mine = queries.narrow(0, call.first, call.rows)
                    parts.append(attend_all(mine, call.view(keys), call.view(values), head))
            along = 2 if calls[0].shared else 0
            out, lse = (torch.cat(part, along) for part in zip(*parts, strict=True))
            if calls[0].shared:
                out = out.view(kv_heads, -1, group, size).transpose(0, 1)
                lse = lse.view(kv_heads, -1, group).transpose(0, 1)
            if not whole:
                here = torch.cat([torch.arange(call.first, call.first + call.rows) for call in calls]).to(q.device)
                out = out.new_zeros(rows, kv_heads, group, size).index_copy_(0, here, out)
                lse = lse.new_full((rows, kv_heads, group), -torch.inf).index_copy_(0, here, lse)
            outputs.append(out)
            weights.append(lse)
        return merged(outputs, weights).to(q.dtype).reshape(rows, -1, size)


@dataclass(frozen=True)
class _Call:
    """One run of slots for some rows from `first` on: the same for all of them, or each its own at equal distance."""

    first: int
    rows: int
    start: int
    length: int
    shared: bool
    distance: int = 0

    def view(self, stored: Tensor) -> Tensor:
        """The rows' own parts of [kv heads, slots, size], with the rows in front; nothing is copied."""
        heads, slots, size = stored.shape
        return stored.as_strided(
            (self.rows, heads, self.length, size),
            (self.distance * size, slots * size, size, 1),
            self.start * size,
        )


def _calls(rows: Sequence[ActiveSequence], window: int | None) -> list[list[_Call]]:
    """What the rows look at: the prompts that neighbours share once, then each row's own tokens.

    Levels are disjoint parts of a row's tokens; a level is of shared parts alone or of own ones, by rows.
    """
    shared: list[list[_Call]] = []
    own: list[list[_Call]] = []
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and _alike(rows[first], rows[last], window):
            last += 1
        runs = _runs(rows[first].prefix, _window_start(rows[first], window), rows[first].position + 1)
        _put(shared, [_Call(first, last - first, a, b - a, True) for a, b in runs])
        at = first
        while at < last:
            end = _in_step(rows, at, last)
            _put(own, _own_calls(rows, at, end, window))
            at = end
        first = last
    return shared + own


def _put(levels: list[list[_Call]], calls: list[_Call]) -> None:
    levels += [[] for _ in range(len(calls) - len(levels))]
    for level, call in zip(levels, calls, strict=False):
        level.append(call)


def _own_calls(rows: Sequence[ActiveSequence], first: int, last: int, window: int | None) -> list[_Call]:
    row = rows[first]
    begin = max(0, _window_start(row, window) - (row.position + 1 - len(row.tokens)))
    calls: list[_Call] = []
    for i, segment in enumerate(row.own):
        length = segment.used - begin
        if length > 0:
            distance = rows[first + 1].own[i].start - segment.start if last > first + 1 else 0
            calls.append(_Call(first, last - first, segment.start + begin, length, False, distance))
        begin = max(0, begin - segment.used)
    return calls


def _window_start(row: ActiveSequence, window: int | None) -> int:
    return max(0, row.position - window + 1) if window else 0


def _alike(a: ActiveSequence, b: ActiveSequence, window: int | None) -> bool:
    return a.prefix is b.prefix and (not window or a.position == b.position)


def _in_step(rows: Sequence[ActiveSequence], first: int, last: int) -> int:
    """Up to where the rows' own segments stand at equal distances and hold equally much."""
    a, end = rows[first], first + 1
    distances: list[int] = []
    while end < last:
        before, b = rows[end - 1], rows[end]
        if len(b.own) != len(a.own) or len(b.tokens) != len(a.tokens):
            break
        pairs = list(zip(before.own, b.own, strict=True))
        distances = distances or [y.start - x.start for x, y in pairs]
        if min(distances) <= 0 or any(
            y.start - x.start != d or y.used != x.used for d, (x, y) in zip(distances, pairs, strict=True)
        ):
            break
        end += 1
    return end


def _runs(chain: Sequence[Piece], begin: int, end: int) -> list[tuple[int, int]]:
    """Slots of the tokens `begin` to `end` of a chain, as runs (from, to); neighbours are joined."""
    runs: list[tuple[int, int]] = []
    at = 0
    for piece in cut(chain, end):
        a, b = max(begin - at, 0), piece.length
        at += b
        if a < b:
            a, b = piece.segment.start + a, piece.segment.start + b
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
    return runs


def _joined(stored: Tensor, runs: Sequence[tuple[int, int]], new: Tensor) -> Tensor:
    return torch.cat([*(stored[:, a:b] for a, b in runs), new], 1) if runs else new


def merged(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Outputs [..., size] over disjoint parts, and the log-sum-exp of each: the output over all of them."""
    if len(outputs) == 1:
        return outputs[0]
    share = torch.softmax(torch.stack(tuple(weights)).float(), 0).unsqueeze(-1)
    return (torch.stack(tuple(outputs)) * share).sum(0)


def attend_all(q: Tensor, k: Tensor, v: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Every query [b, heads, n, size] sees every key [b, heads, m, size]: the output and its log-sum-exp."""
    if q.device.type == "cpu" and head.cap is None and k.shape[-1] == v.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, False, scale=head.scale
        )
        return out, lse
    scores = _scores(q, k, head)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v.float(), lse.squeeze(-1)


def causal(q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
    """Queries [heads, n, size] of the last n of the keys' tokens [kv heads, m, size]; the output is shaped like q."""
    n, m = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    plain = head.cap is None and k.shape[-1] == v.shape[-1]
    if plain and not head.window and _flash_takes(q[None], k[None], v[None]):
        # Its causal mask is that of the last n tokens, as it is meant here.
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            q[None], k[None], v[None], 0.0, True, False, scale=head.scale
        )
        return out[0][0]  # type: ignore[no-any-return]
    if group > 1:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if plain:
        seen = _seen(n, m, head.window, q.device) if m > n or head.window else None
        return functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, is_causal=seen is None, scale=head.scale
        )[0]
    outputs = []
    step = max(1, _MOST_SCORES // (q.shape[0] * m))
    for begin in range(0, n, step):
        part = q[:, begin : begin + step]
        end = m - n + begin + part.shape[1]
        seen = _seen(part.shape[1], end, head.window, q.device)
        scores = _scores(part, k[:, :end], head).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v[:, :end].float()).to(q.dtype))
    return torch.cat(outputs, 1)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this device has torch's flash attention for them: not every dtype, head size and GPU does."""
    shared = q.shape[1] != k.shape[1]
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, shared)
    return q.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(asked)


def _scores(q: Tensor, k: Tensor, head: Head) -> Tensor:
    scores = (q.float() @ k.float().transpose(-1, -2)) * head.scale
    return head.cap * torch.tanh(scores / head.cap) if head.cap else scores


def _seen(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    here = torch.arange(m - n, m, device=device).unsqueeze(1)
    there = torch.arange(m, device=device)
    seen = there <= here
    return seen & (there > here - window) if window else seen
