"""Scheduler: decides what the next step prefills and decodes. It knows tokens, memory and arrival, not the model.

Requests are admitted in order of arrival, those of resumed jobs first, while a row and memory are free. When memory
runs out, the youngest sample is preempted: it returns to the queue and restarts later, and its seed gives the same
tokens. The first request in the queue can always be admitted, so every request finishes.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from tpo.backends.futures import succeed
from tpo.backends.local.kv_allocator import Chain, KVCacheAllocator, Piece, Segment, chain_length
from tpo.backends.local.prefix_cache import PrefixCache
from tpo.backends.local.requests import Answer, Completion, Ticket

if TYPE_CHECKING:
    from tpo.core.state import FinishReason

FIRST_SLOTS = 128
"""Slots that a sample gets at first. Each further segment doubles its slots."""


@dataclass(frozen=True)
class Limits:
    """Limits of one step."""

    rows: int
    """Maximum number of sequences decoded at once."""
    tokens: int
    """Slots in the KV cache."""
    chunk: int
    """Maximum number of prompt tokens prefilled in one step."""
    patience: int = 0
    """Steps that a prompt may wait for others, so that they are prefilled together."""


@dataclass(eq=False)
class PrefillRequest:
    """A prompt in prefill, for some samples of its request."""

    ticket: Ticket
    samples: list[int]
    chain: Chain
    position: int
    """Number of prompt tokens that are in the cache."""
    waited: int = 0
    """Steps since its last chunk."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of the prompt."""
        return self.ticket.request.prompt


@dataclass(frozen=True)
class PrefillChunk:
    """The part of a prompt that one step prefills: tokens `begin` to `end`."""

    reading: PrefillRequest
    begin: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the prompt ends with this chunk; if so, its logits are needed."""
        return self.end == len(self.reading.prompt)


@dataclass(eq=False)
class ActiveSequence:
    """One sample being decoded. Its latest token is not in the cache yet."""

    ticket: Ticket
    sample: int
    prefix: Chain
    """The chain of the prompt, shared with the other samples of the request."""
    tokens: list[int]
    own: list[Segment] = field(default_factory=list)
    """Segments for the generated tokens."""
    table: int = -1
    """Index of its slot table in the runner; -1 for none."""

    @property
    def position(self) -> int:
        """Position of the latest token in the sequence."""
        return len(self.ticket.request.prompt) + len(self.tokens) - 1

    @property
    def slot(self) -> int:
        """Slot that the latest token is written to."""
        return self.own[-1].start + self.own[-1].used - 1


@dataclass(frozen=True)
class Plan:
    """One step: the prompt chunks to prefill, and the sequences that decode one token each."""

    chunks: tuple[PrefillChunk, ...]
    rows: list[ActiveSequence]


class Scheduler:
    """Queue, running sequences and memory of one engine. Not thread-safe."""

    def __init__(self, limits: Limits, stop_tokens: frozenset[int]) -> None:
        self.limits = limits
        self.arena = KVCacheAllocator(limits.tokens)
        self.prefixes = PrefixCache(self.arena)
        self.waiting: list[Ticket] = []
        self.readings: list[PrefillRequest] = []
        self.rows: list[ActiveSequence] = []
        self._stop = stop_tokens
        self._short_of_memory = False

    @property
    def busy(self) -> bool:
        """Whether the next step has work to do."""
        return bool(self.waiting or self.readings or self.rows)

    def add(self, ticket: Ticket) -> None:
        """Add a request to the queue, unless it is there already."""
        if ticket not in self.waiting:
            insort(self.waiting, ticket, key=_priority)

    def plan(self) -> Plan:
        """Plan the next step, and reserve a slot for each of its sequences."""
        self._drop_done()
        self._reserve()
        self._admit()
        return Plan(self._chunks(), self.rows)

    def read(self, chunks: Iterable[PrefillChunk]) -> None:
        """Record that these chunks are in the cache."""
        for chunk in chunks:
            chunk.reading.position = chunk.end
            chunk.reading.waited = 0

    def join(self, reading: PrefillRequest, first: list[int]) -> None:
        """Start the samples of a prompt whose prefill is complete; `first` holds their first tokens."""
        self.readings.remove(reading)
        ticket = reading.ticket
        ticket.timings.first_token = ticket.timings.first_token or monotonic()
        self.prefixes.keep(reading.prompt, reading.chain)
        rows = [
            ActiveSequence(ticket, sample, reading.chain, [token])
            for sample, token in zip(reading.samples, first, strict=True)
        ]
        for row in rows:
            self.arena.hold(row.prefix)
        self.arena.release(piece.segment for piece in reading.chain)
        self.rows = [*self.rows, *rows]
        self._finish(rows)

    def advance(self, rows: list[ActiveSequence], tokens: list[int]) -> None:
        """Append the token that each sequence has decoded."""
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        self._finish(rows)

    def preempt_youngest(self) -> bool:
        """Preempt the sample or prompt that arrived last. Return False if at most one is active."""
        if len(self.rows) + len(self.readings) < 2:
            return False
        self._preempt(self._youngest())
        return True

    def clear(self) -> list[Ticket]:
        """Drop everything and return the unanswered requests."""
        tickets = [*self.waiting, *(r.ticket for r in self.readings), *(row.ticket for row in self.rows)]
        self.waiting, self.readings, self.rows = [], [], []
        return [t for t in dict.fromkeys(tickets) if not t.is_done]

    def _youngest(self) -> "ActiveSequence | PrefillRequest":
        working: list[ActiveSequence | PrefillRequest] = [*self.rows, *self.readings]
        return max(working, key=_seniority)

    def _drop_done(self) -> None:
        """Drop requests that were answered, failed or cancelled."""
        if any(t.is_done for t in self.waiting):
            self.waiting = [t for t in self.waiting if not t.is_done]
        for reading in [r for r in self.readings if r.ticket.is_done]:
            self.readings.remove(reading)
            self.arena.release(piece.segment for piece in reading.chain)
            self._short_of_memory = False
        self._remove([row for row in self.rows if row.ticket.is_done])

    def _remove(self, leaving: list[ActiveSequence]) -> None:
        if not leaving:
            return
        for row in leaving:
            self.arena.release(row.own)
            self.arena.release(piece.segment for piece in row.prefix)
        removed = set(map(id, leaving))
        self.rows = [row for row in self.rows if id(row) not in removed]
        self._short_of_memory = False

    def _finish(self, rows: Iterable[ActiveSequence]) -> None:
        """Remove complete sequences. The last sample of a request answers it; the next plan drops failed requests."""
        leaving = [row for row in rows if not row.ticket.is_done and self._complete(row)]
        self._remove(leaving)

    def _complete(self, row: ActiveSequence) -> bool:
        """Record the completion if the sequence is complete. Return whether it is."""
        request, done = row.ticket.request, row.ticket.done
        reason: FinishReason
        if row.tokens[-1] in self._stop or (request.ended and request.ended(row.tokens)):
            reason = "stop"
        elif len(row.tokens) >= request.max_tokens:
            reason = "length"
        else:
            return False
        done[row.sample] = Completion(tuple(row.tokens), reason)
        if len(request.seeds) == 1:
            self._cache(row)
        if len(done) == len(request.seeds):
            row.ticket.timings.finished = monotonic()
            succeed(row.ticket.future, Answer(tuple(done[i] for i in range(len(done))), row.ticket.timings))
        return True

    def _cache(self, row: ActiveSequence) -> None:
        """Cache a finished sequence: a single completion is often a prefix of the next call's prompt."""
        if not row.own or not row.own[-1].used:
            return
        self.arena.trim(row.own[-1])
        chain = (*row.prefix, *(Piece(segment, segment.used) for segment in row.own))
        self.prefixes.keep((*row.ticket.request.prompt, *row.tokens)[: chain_length(chain)], chain)

    def _preempt(self, victim: ActiveSequence | PrefillRequest) -> None:
        """Free the memory of a sample or prompt and return it to the queue."""
        ticket = victim.ticket
        ticket.timings.preempted += 1
        if isinstance(victim, ActiveSequence):
            ticket.remaining.append(victim.sample)
            self._remove([victim])
        else:
            ticket.remaining += victim.samples
            self.readings.remove(victim)
            self.arena.release(piece.segment for piece in victim.chain)
        ticket.remaining.sort()
        self.add(ticket)
        # A preempted request waits until another has left. Otherwise two requests could preempt each other forever.
        self._short_of_memory = True

    def _free_slots(self, count: int) -> bool:
        """Evict cached prefixes until `count` slots are free. Return False if that is not possible."""
        while self.arena.free < count:
            if not self.prefixes.forget_one():
                return False
        return True

    def _reserve(self) -> None:
        """Reserve a slot for the next token of each sequence, the oldest first."""
        full = [row for row in self.rows if sum(s.capacity for s in row.own) < len(row.tokens)]
        for row in self._grow_groups(full):
            while row in self.rows and not self._grow(row):
                self._preempt(self._youngest())
        for row in self.rows:
            row.own[-1].used = len(row.tokens) - sum(s.capacity for s in row.own[:-1])

    def _grow_groups(self, rows: list[ActiveSequence]) -> list[ActiveSequence]:
        """Give adjacent segments to samples of one request with equal length. Return the rows that got none."""
        groups: dict[tuple[int, int], list[ActiveSequence]] = {}
        for row in rows:
            groups.setdefault((id(row.ticket), len(row.tokens)), []).append(row)
        rest = []
        for group in groups.values():
            each = _next_size(group[0])
            self._free_slots(len(group) * each)
            segments = self.arena.take_equal(len(group), each)
            for row, segment in zip(group, segments, strict=False):
                row.own.append(segment)
            rest += [] if segments else group
        return sorted(rest, key=_seniority)

    def _grow(self, row: ActiveSequence) -> bool:
        """Give a sequence another segment. Return False if no slot can be freed."""
        size = min(_next_size(row), max(self.arena.free, 1))
        if not self._free_slots(size):
            return False
        # Take only the first, largest segment: a few slots in one gap are better than a chain of tiny segments.
        segments = self.arena.take(size)
        self.arena.release(segments[1:])
        row.own += segments[:1]
        return bool(segments)

    def _admit(self) -> None:
        """Start the prefill of waiting requests, in order, until one does not fit."""
        in_prefill = {reading.prompt for reading in self.readings}
        for ticket in list(self.waiting):
            if self._short_of_memory and (self.rows or self.readings):
                return
            if ticket.request.prompt in in_prefill:
                continue  # The prefix cache will soon contain this prompt.
            if not self._start(ticket):
                return
            in_prefill.add(ticket.request.prompt)

    def _start(self, ticket: Ticket) -> bool:
        """Start the prefill of a prompt for as many of its samples as fit. Return False if none fits."""
        request = ticket.request
        rows = self.limits.rows - len(self.rows) - sum(len(r.samples) for r in self.readings)
        if rows <= 0:
            return False
        known = self.prefixes.longest(request.prompt)
        self.arena.hold(known)
        missing = len(request.prompt) - chain_length(known)
        each = min(request.max_tokens, FIRST_SLOTS)
        count = min(rows, len(ticket.remaining))
        while not self._free_slots(missing + count * each) and count > 1:
            count //= 2
        idle = not self.rows and not self.readings
        if not (self._free_slots(missing + count * each) or (idle and self._free_slots(missing + 1))):
            self.arena.release(piece.segment for piece in known)
            return False
        new = self.arena.take(missing)
        for segment in new:
            segment.used = segment.capacity
        chain = (*known, *(Piece(segment, segment.used) for segment in new))
        samples, ticket.remaining = ticket.remaining[:count], ticket.remaining[count:]
        if not ticket.remaining:
            self.waiting.remove(ticket)
        ticket.timings.started = ticket.timings.started or monotonic()
        ticket.timings.reused_tokens = chain_length(known)
        self.readings.append(PrefillRequest(ticket, samples, chain, chain_length(known)))
        return True

    def _chunks(self) -> tuple[PrefillChunk, ...]:
        """Return the prompt chunks of the next step, within its limit.

        With patience, return nothing until a full chunk has accumulated, no sequence is running or a prompt has waited
        too long.
        """
        left = sum(len(r.prompt) - r.position for r in self.readings)
        for reading in self.readings:
            reading.waited += 1
        eager = not self.rows or left >= self.limits.chunk
        if not eager and all(r.waited <= self.limits.patience for r in self.readings):
            return ()
        chunks, remaining = [], self.limits.chunk
        for reading in self.readings:
            if not remaining:
                break
            end = min(len(reading.prompt), reading.position + remaining)
            remaining -= end - reading.position
            chunks.append(PrefillChunk(reading, reading.position, end))
        return tuple(chunks)


def _priority(ticket: Ticket) -> tuple[bool, int]:
    """Sort key of the queue: resumed jobs first, then by arrival."""
    return not ticket.request.under_way, ticket.number


def _seniority(item: ActiveSequence | PrefillRequest) -> tuple[bool, int, int]:
    """Sort key of active work, from oldest to youngest."""
    sample = item.sample if isinstance(item, ActiveSequence) else item.samples[-1]
    return (*_priority(item.ticket), sample)


def _next_size(row: ActiveSequence) -> int:
    """Return the slots of the sequence's next segment: as many as it has, at least FIRST_SLOTS, up to max_tokens."""
    have = sum(segment.capacity for segment in row.own)
    return max(1, min(row.ticket.request.max_tokens - have, max(have, FIRST_SLOTS)))
