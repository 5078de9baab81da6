"""Scheduler: decides what the next step prefills and decodes. It knows tokens, memory and arrival, not the model.

Requests are admitted in order of arrival, continuations first, while memory is free and fewer than the maximum number
of sequences are running. When memory runs out, the youngest sample is preempted: it returns to the queue and restarts
later, and its seed gives the same tokens. The first request in the queue can always be admitted, so every request
finishes.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from tpo.backends.futures import succeed
from tpo.backends.local.kv_allocator import Chain, KVCacheAllocator, Segment, SegmentSlice, chain_length
from tpo.backends.local.prefix_cache import PrefixCache
from tpo.backends.local.requests import Completion, EngineRequest, RequestOutput

if TYPE_CHECKING:
    from tpo.core.state import FinishReason

INITIAL_SLOTS = 128
"""Slots of a sample's first segment. Each further segment doubles its slots."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step."""

    max_sequences: int
    """Maximum number of sequences decoded at once."""
    cache_slots: int
    """Slots in the KV cache, one per token."""
    prefill_tokens: int
    """Maximum number of prompt tokens prefilled in one step."""
    max_wait_steps: int = 0
    """Steps that a prompt may wait for others, so that they are prefilled together."""


@dataclass(eq=False)
class PrefillRequest:
    """A prompt in prefill, for some samples of its request."""

    request: EngineRequest
    samples: list[int]
    chain: Chain
    position: int
    """Number of prompt tokens that are in the cache."""
    waited_steps: int = 0
    """Steps since its last chunk."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of the prompt."""
        return self.request.inputs.prompt


@dataclass(frozen=True)
class PrefillChunk:
    """The part of a prompt that one step prefills: tokens `begin` to `end`."""

    prefill: PrefillRequest
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        """True when the prompt ends with this chunk; then, its logits are needed."""
        return self.end == len(self.prefill.prompt)


@dataclass(eq=False)
class ActiveSequence:
    """One sample being decoded. Its latest token is not in the cache yet."""

    request: EngineRequest
    sample: int
    prefix: Chain
    """The chain of the prompt, shared with the other samples of the request."""
    tokens: list[int]
    segments: list[Segment] = field(default_factory=list)
    """Segments for the generated tokens."""
    table_index: int = -1
    """Index of its slot table in the runner; -1 for none."""

    @property
    def position(self) -> int:
        """Position of the latest token in the sequence."""
        return len(self.request.inputs.prompt) + len(self.tokens) - 1

    @property
    def slot(self) -> int:
        """Slot that the latest token is written to."""
        return self.segments[-1].start + self.segments[-1].used - 1


@dataclass(frozen=True)
class Plan:
    """One step: the prompt chunks to prefill, and the sequences that decode one token each."""

    chunks: tuple[PrefillChunk, ...]
    sequences: list[ActiveSequence]


class Scheduler:
    """Queue, running sequences and memory of one engine. Not thread-safe."""

    def __init__(self, config: SchedulerConfig, stop_tokens: frozenset[int]) -> None:
        self.config = config
        self.allocator = KVCacheAllocator(config.cache_slots)
        self.prefix_cache = PrefixCache(self.allocator)
        self.waiting: list[EngineRequest] = []
        self.prefilling: list[PrefillRequest] = []
        self.running: list[ActiveSequence] = []
        self._stop_tokens = stop_tokens
        self._admission_paused = False

    @property
    def has_work(self) -> bool:
        """True when the next step has work to do."""
        return bool(self.waiting or self.prefilling or self.running)

    def add(self, request: EngineRequest) -> None:
        """Add a request to the queue, unless it is there already."""
        if request not in self.waiting:
            insort(self.waiting, request, key=_queue_key)

    def plan(self) -> Plan:
        """Plan the next step, and reserve a slot for each of its sequences."""
        self._remove_finished()
        self._reserve()
        self._admit()
        return Plan(self._plan_chunks(), self.running)

    def record_prefilled(self, chunks: Iterable[PrefillChunk]) -> None:
        """Record that the tokens of these chunks are in the cache."""
        for chunk in chunks:
            chunk.prefill.position = chunk.end
            chunk.prefill.waited_steps = 0

    def start_decoding(self, prefill: PrefillRequest, first_tokens: list[int]) -> None:
        """Start to decode the samples of a prompt whose prefill is complete. There is one first token per sample."""
        self.prefilling.remove(prefill)
        request = prefill.request
        request.metrics.first_token_at = request.metrics.first_token_at or monotonic()
        self.prefix_cache.insert(prefill.prompt, prefill.chain)
        sequences = [
            ActiveSequence(request, sample, prefill.chain, [token])
            for sample, token in zip(prefill.samples, first_tokens, strict=True)
        ]
        for sequence in sequences:
            self.allocator.acquire(sequence.prefix)
        self.allocator.release(part.segment for part in prefill.chain)
        self.running = [*self.running, *sequences]
        self._remove_completed(sequences)

    def append_tokens(self, sequences: list[ActiveSequence], tokens: list[int]) -> None:
        """Append the token that each sequence has decoded."""
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        self._remove_completed(sequences)

    def preempt_youngest(self) -> bool:
        """Preempt the sample or prompt that arrived last. Return False if at most one is active."""
        if len(self.running) + len(self.prefilling) < 2:
            return False
        self._preempt(self._youngest())
        return True

    def clear(self) -> list[EngineRequest]:
        """Remove all work and return the unfinished requests."""
        requests = [
            *self.waiting,
            *(prefill.request for prefill in self.prefilling),
            *(sequence.request for sequence in self.running),
        ]
        self.waiting, self.prefilling, self.running = [], [], []
        return [request for request in dict.fromkeys(requests) if not request.is_finished]

    def _youngest(self) -> "ActiveSequence | PrefillRequest":
        active: list[ActiveSequence | PrefillRequest] = [*self.running, *self.prefilling]
        return max(active, key=_age_key)

    def _remove_finished(self) -> None:
        """Remove requests that have their output, have failed or were cancelled."""
        if any(request.is_finished for request in self.waiting):
            self.waiting = [request for request in self.waiting if not request.is_finished]
        for prefill in [p for p in self.prefilling if p.request.is_finished]:
            self.prefilling.remove(prefill)
            self.allocator.release(part.segment for part in prefill.chain)
            self._admission_paused = False
        self._remove([sequence for sequence in self.running if sequence.request.is_finished])

    def _remove(self, sequences: list[ActiveSequence]) -> None:
        """Remove running sequences and release their memory."""
        if not sequences:
            return
        for sequence in sequences:
            self.allocator.release(sequence.segments)
            self.allocator.release(part.segment for part in sequence.prefix)
        removed = set(map(id, sequences))
        self.running = [sequence for sequence in self.running if id(sequence) not in removed]
        self._admission_paused = False

    def _remove_completed(self, sequences: Iterable[ActiveSequence]) -> None:
        """Remove complete sequences. The next plan removes those of failed requests."""
        self._remove([each for each in sequences if not each.request.is_finished and self._complete(each)])

    def _complete(self, sequence: ActiveSequence) -> bool:
        """Record the completion if the sequence is complete. Return whether it is.

        The last completion of a request sets the result of its future.
        """
        request = sequence.request
        inputs, completions = request.inputs, request.completions
        reason: FinishReason
        if sequence.tokens[-1] in self._stop_tokens or (inputs.stop_check and inputs.stop_check(sequence.tokens)):
            reason = "stop"
        elif len(sequence.tokens) >= inputs.max_tokens:
            reason = "length"
        else:
            return False
        completions[sequence.sample] = Completion(tuple(sequence.tokens), reason)
        if len(inputs.seeds) == 1:
            self._cache(sequence)
        if len(completions) == len(inputs.seeds):
            request.metrics.finished_at = monotonic()
            in_order = tuple(completions[i] for i in range(len(completions)))
            succeed(request.future, RequestOutput(in_order, request.metrics))
        return True

    def _cache(self, sequence: ActiveSequence) -> None:
        """Cache a finished sequence: a single completion is often a prefix of the next call's prompt."""
        if not sequence.segments or not sequence.segments[-1].used:
            return
        self.allocator.trim(sequence.segments[-1])
        chain = (*sequence.prefix, *(SegmentSlice(segment, segment.used) for segment in sequence.segments))
        tokens = (*sequence.request.inputs.prompt, *sequence.tokens)
        self.prefix_cache.insert(tokens[: chain_length(chain)], chain)

    def _preempt(self, victim: ActiveSequence | PrefillRequest) -> None:
        """Release the memory of a sample or prompt and return it to the queue."""
        request = victim.request
        request.metrics.preemptions += 1
        if isinstance(victim, ActiveSequence):
            request.pending_samples.append(victim.sample)
            self._remove([victim])
        else:
            request.pending_samples += victim.samples
            self.prefilling.remove(victim)
            self.allocator.release(part.segment for part in victim.chain)
        request.pending_samples.sort()
        self.add(request)
        # Nothing is admitted until a request has left. Otherwise two requests could preempt each other endlessly.
        self._admission_paused = True

    def _free_slots(self, count: int) -> bool:
        """Evict cached prefixes until `count` slots are free. Return False if that is not possible."""
        while self.allocator.free < count:
            if not self.prefix_cache.evict():
                return False
        return True

    def _reserve(self) -> None:
        """Reserve a slot for the next token of each sequence, the oldest first."""
        full = [each for each in self.running if sum(s.capacity for s in each.segments) < len(each.tokens)]
        for sequence in self._add_adjacent_segments(full):
            while sequence in self.running and not self._add_segment(sequence):
                self._preempt(self._youngest())
        for sequence in self.running:
            sequence.segments[-1].used = len(sequence.tokens) - sum(s.capacity for s in sequence.segments[:-1])

    def _add_adjacent_segments(self, sequences: list[ActiveSequence]) -> list[ActiveSequence]:
        """Give adjacent segments to samples of one request with equal length. Return the sequences that got none."""
        groups: dict[tuple[int, int], list[ActiveSequence]] = {}
        for sequence in sequences:
            groups.setdefault((id(sequence.request), len(sequence.tokens)), []).append(sequence)
        rest = []
        for group in groups.values():
            size = _next_segment_size(group[0])
            self._free_slots(len(group) * size)
            segments = self.allocator.allocate_adjacent(len(group), size)
            for sequence, segment in zip(group, segments, strict=False):
                sequence.segments.append(segment)
            rest += [] if segments else group
        return sorted(rest, key=_age_key)

    def _add_segment(self, sequence: ActiveSequence) -> bool:
        """Give a sequence another segment. Return False if no slot can be freed."""
        size = min(_next_segment_size(sequence), max(self.allocator.free, 1))
        if not self._free_slots(size):
            return False
        # Use only the first, largest segment: a few slots in one run are better than a chain of tiny segments.
        segments = self.allocator.allocate(size)
        self.allocator.release(segments[1:])
        sequence.segments += segments[:1]
        return bool(segments)

    def _admit(self) -> None:
        """Start the prefill of waiting requests, in order, until one does not fit."""
        prompts = {prefill.prompt for prefill in self.prefilling}
        for request in list(self.waiting):
            if self._admission_paused and (self.running or self.prefilling):
                return
            if request.inputs.prompt in prompts:
                continue  # The prefix cache will soon contain this prompt.
            if not self._start_prefill(request):
                return
            prompts.add(request.inputs.prompt)

    def _start_prefill(self, request: EngineRequest) -> bool:
        """Start the prefill of a prompt for as many of its samples as fit. Return False if none fits."""
        inputs = request.inputs
        available = self.config.max_sequences - len(self.running) - sum(len(p.samples) for p in self.prefilling)
        if available <= 0:
            return False
        cached = self.prefix_cache.match(inputs.prompt)
        self.allocator.acquire(cached)
        missing = len(inputs.prompt) - chain_length(cached)
        each = min(inputs.max_tokens, INITIAL_SLOTS)
        count = min(available, len(request.pending_samples))
        while not self._free_slots(missing + count * each) and count > 1:
            count //= 2
        idle = not self.running and not self.prefilling
        if not (self._free_slots(missing + count * each) or (idle and self._free_slots(missing + 1))):
            self.allocator.release(part.segment for part in cached)
            return False
        new = self.allocator.allocate(missing)
        for segment in new:
            segment.used = segment.capacity
        chain = (*cached, *(SegmentSlice(segment, segment.used) for segment in new))
        samples, request.pending_samples = request.pending_samples[:count], request.pending_samples[count:]
        if not request.pending_samples:
            self.waiting.remove(request)
        request.metrics.started_at = request.metrics.started_at or monotonic()
        request.metrics.cached_tokens = chain_length(cached)
        self.prefilling.append(PrefillRequest(request, samples, chain, chain_length(cached)))
        return True

    def _plan_chunks(self) -> tuple[PrefillChunk, ...]:
        """Return the prompt chunks of the next step, within its limit.

        With `max_wait_steps`, return nothing until a full chunk has accumulated, no sequence is running or a prompt has
        waited too long.
        """
        left = sum(len(prefill.prompt) - prefill.position for prefill in self.prefilling)
        for prefill in self.prefilling:
            prefill.waited_steps += 1
        eager = not self.running or left >= self.config.prefill_tokens
        if not eager and all(p.waited_steps <= self.config.max_wait_steps for p in self.prefilling):
            return ()
        chunks, remaining = [], self.config.prefill_tokens
        for prefill in self.prefilling:
            if not remaining:
                break
            end = min(len(prefill.prompt), prefill.position + remaining)
            remaining -= end - prefill.position
            chunks.append(PrefillChunk(prefill, prefill.position, end))
        return tuple(chunks)


def _queue_key(request: EngineRequest) -> tuple[bool, int]:
    """Sort key of the queue: continuations first, then by arrival."""
    return not request.inputs.is_continuation, request.number


def _age_key(item: ActiveSequence | PrefillRequest) -> tuple[bool, int, int]:
    """Sort key of active work, from oldest to youngest."""
    sample = item.sample if isinstance(item, ActiveSequence) else item.samples[-1]
    return (*_queue_key(item.request), sample)


def _next_segment_size(sequence: ActiveSequence) -> int:
    """Return the slots of the sequence's next segment: as many as it has, at least INITIAL_SLOTS, up to max_tokens."""
    have = sum(segment.capacity for segment in sequence.segments)
    return max(1, min(sequence.request.inputs.max_tokens - have, max(have, INITIAL_SLOTS)))
