"""Decides what the next step reads and writes. Knows tokens, memory and arrival; never touches the model.

Requests are admitted in their order, those of jobs under way first, while there is a row and memory for them. Where
memory runs out, the youngest sample is put back among those that wait and begins again later: its seed gives the same
tokens. The first of all always finds room, so that everything ends.
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
"""What a sample gets to begin with; each further segment doubles what it has."""


@dataclass(frozen=True)
class Limits:
    """What a step may hold."""

    rows: int
    """Samples written at once."""
    tokens: int
    """Slots for keys and values."""
    chunk: int
    """Prompt tokens read in one step."""
    patience: int = 0
    """Steps that a prompt may wait for others, so that they are read together."""


@dataclass(eq=False)
class PrefillRequest:
    """A prompt that is being read, for some samples of its request."""

    ticket: Ticket
    samples: list[int]
    chain: Chain
    position: int
    """Tokens that are in the cache."""
    waited: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ticket.request.prompt


@dataclass(frozen=True)
class PrefillChunk:
    """The part of a prompt that a step reads."""

    reading: PrefillRequest
    begin: int
    end: int

    @property
    def last(self) -> bool:
        """Whether the prompt ends here, so that its logits are wanted."""
        return self.end == len(self.reading.prompt)


@dataclass(eq=False)
class ActiveSequence:
    """One sample being written. What it wrote last is not in the cache yet."""

    ticket: Ticket
    sample: int
    prefix: Chain
    """The prompt, shared with the other samples of its request."""
    tokens: list[int]
    own: list[Segment] = field(default_factory=list)
    table: int = -1
    """The runner's number for it."""

    @property
    def position(self) -> int:
        """Where the next token stands."""
        return len(self.ticket.request.prompt) + len(self.tokens) - 1

    @property
    def slot(self) -> int:
        """Where the next token is written."""
        return self.own[-1].start + self.own[-1].used - 1


@dataclass(frozen=True)
class Plan:
    """One step: the prompts that are read, and the rows that write a token each."""

    chunks: tuple[PrefillChunk, ...]
    rows: list[ActiveSequence]


class Scheduler:
    """One engine's queue, rows and memory. One thread calls it."""

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
        """Whether a step has anything to do."""
        return bool(self.waiting or self.readings or self.rows)

    def add(self, ticket: Ticket) -> None:
        """A request arrives, or comes back."""
        if ticket not in self.waiting:
            insort(self.waiting, ticket, key=_rank)

    def plan(self) -> Plan:
        """The next step. Rows that it names have their slots."""
        self._drop_the_gone()
        self._reserve()
        self._admit()
        return Plan(self._chunks(), self.rows)

    def read(self, chunks: Iterable[PrefillChunk]) -> None:
        """These parts of prompts are in the cache now."""
        for chunk in chunks:
            chunk.reading.position = chunk.end
            chunk.reading.waited = 0

    def join(self, reading: PrefillRequest, first: list[int]) -> None:
        """A prompt has been read; each of its samples has its first token."""
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
        """Each row has written a token."""
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        self._finish(rows)

    def preempt_youngest(self) -> bool:
        """Make room by what arrived last; False when there is at most one sample or prompt in the step."""
        if len(self.rows) + len(self.readings) < 2:
            return False
        self._preempt(self._youngest())
        return True

    def clear(self) -> list[Ticket]:
        """Drop everything; gives the requests that are not answered."""
        tickets = [*self.waiting, *(r.ticket for r in self.readings), *(row.ticket for row in self.rows)]
        self.waiting, self.readings, self.rows = [], [], []
        return [t for t in dict.fromkeys(tickets) if not t.gone]

    def _youngest(self) -> "ActiveSequence | PrefillRequest":
        working: list[ActiveSequence | PrefillRequest] = [*self.rows, *self.readings]
        return max(working, key=_seniority)

    def _drop_the_gone(self) -> None:
        if any(t.gone for t in self.waiting):
            self.waiting = [t for t in self.waiting if not t.gone]
        for reading in [r for r in self.readings if r.ticket.gone]:
            self.readings.remove(reading)
            self.arena.release(piece.segment for piece in reading.chain)
            self._short_of_memory = False
        self._remove([row for row in self.rows if row.ticket.gone])

    def _remove(self, leaving: list[ActiveSequence]) -> None:
        if not leaving:
            return
        for row in leaving:
            self.arena.release(row.own)
            self.arena.release(piece.segment for piece in row.prefix)
        gone = set(map(id, leaving))
        self.rows = [row for row in self.rows if id(row) not in gone]
        self._short_of_memory = False

    def _finish(self, rows: Iterable[ActiveSequence]) -> None:
        """Hand in what is whole; the last sample of a request answers it. The next plan drops what has failed."""
        leaving = [row for row in rows if not row.ticket.gone and self._hand_in(row)]
        self._remove(leaving)

    def _hand_in(self, row: ActiveSequence) -> bool:
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
            self._keep(row)
        if len(done) == len(request.seeds):
            row.ticket.timings.finished = monotonic()
            succeed(row.ticket.future, Answer(tuple(done[i] for i in range(len(done))), row.ticket.timings))
        return True

    def _keep(self, row: ActiveSequence) -> None:
        """A single answer is often the beginning of the next call's prompt."""
        if not row.own or not row.own[-1].used:
            return
        self.arena.trim(row.own[-1])
        chain = (*row.prefix, *(Piece(segment, segment.used) for segment in row.own))
        self.prefixes.keep((*row.ticket.request.prompt, *row.tokens)[: chain_length(chain)], chain)

    def _preempt(self, victim: ActiveSequence | PrefillRequest) -> None:
        ticket = victim.ticket
        ticket.timings.preempted += 1
        if isinstance(victim, ActiveSequence):
            ticket.todo.append(victim.sample)
            self._remove([victim])
        else:
            ticket.todo += victim.samples
            self.readings.remove(victim)
            self.arena.release(piece.segment for piece in victim.chain)
        ticket.todo.sort()
        self.add(ticket)
        # Whoever came back waits until somebody has left: or the same two would push each other out for ever.
        self._short_of_memory = True

    def _make_room(self, count: int) -> bool:
        while self.arena.free < count:
            if not self.prefixes.forget_one():
                return False
        return True

    def _reserve(self) -> None:
        """Each row gets the slot of its next token, the oldest first."""
        full = [row for row in self.rows if sum(s.capacity for s in row.own) < len(row.tokens)]
        for row in self._grow_together(full):
            while row in self.rows and not self._grow(row):
                self._preempt(self._youngest())
        for row in self.rows:
            row.own[-1].used = len(row.tokens) - sum(s.capacity for s in row.own[:-1])

    def _grow_together(self, rows: list[ActiveSequence]) -> list[ActiveSequence]:
        """Samples of one request that go in step get neighbouring segments; gives the rows that got none, in order."""
        groups: dict[tuple[int, int], list[ActiveSequence]] = {}
        for row in rows:
            groups.setdefault((id(row.ticket), len(row.tokens)), []).append(row)
        rest = []
        for group in groups.values():
            each = _next_size(group[0])
            self._make_room(len(group) * each)
            segments = self.arena.take_equal(len(group), each)
            for row, segment in zip(group, segments, strict=False):
                row.own.append(segment)
            rest += [] if segments else group
        return sorted(rest, key=_seniority)

    def _grow(self, row: ActiveSequence) -> bool:
        size = min(_next_size(row), max(self.arena.free, 1))
        if not self._make_room(size):
            return False
        # A few slots in the gap that there is are better than a chain of tiny ones.
        segments = self.arena.take(size)
        self.arena.release(segments[1:])
        row.own += segments[:1]
        return bool(segments)

    def _admit(self) -> None:
        being_read = {reading.prompt for reading in self.readings}
        for ticket in list(self.waiting):
            if self._short_of_memory and (self.rows or self.readings):
                return
            if ticket.request.prompt in being_read:
                continue  # its keys and values will be there in a moment
            if not self._start(ticket):
                return
            being_read.add(ticket.request.prompt)

    def _start(self, ticket: Ticket) -> bool:
        """Begin to read a prompt for as many of its samples as there is room for."""
        request = ticket.request
        rows = self.limits.rows - len(self.rows) - sum(len(r.samples) for r in self.readings)
        if rows <= 0:
            return False
        known = self.prefixes.longest(request.prompt)
        self.arena.hold(known)
        missing = len(request.prompt) - chain_length(known)
        each = min(request.max_tokens, FIRST_SLOTS)
        count = min(rows, len(ticket.todo))
        while not self._make_room(missing + count * each) and count > 1:
            count //= 2
        alone = not self.rows and not self.readings
        if not (self._make_room(missing + count * each) or (alone and self._make_room(missing + 1))):
            self.arena.release(piece.segment for piece in known)
            return False
        new = self.arena.take(missing)
        for segment in new:
            segment.used = segment.capacity
        chain = (*known, *(Piece(segment, segment.used) for segment in new))
        samples, ticket.todo = ticket.todo[:count], ticket.todo[count:]
        if not ticket.todo:
            self.waiting.remove(ticket)
        ticket.timings.started = ticket.timings.started or monotonic()
        ticket.timings.reused_tokens = chain_length(known)
        self.readings.append(PrefillRequest(ticket, samples, chain, chain_length(known)))
        return True

    def _chunks(self) -> tuple[PrefillChunk, ...]:
        """Parts of prompts under the limit of a step; where patience is allowed, nothing until it is worth it."""
        left = sum(len(r.prompt) - r.position for r in self.readings)
        for reading in self.readings:
            reading.waited += 1
        eager = not self.rows or left >= self.limits.chunk
        if not eager and all(r.waited <= self.limits.patience for r in self.readings):
            return ()
        chunks, room = [], self.limits.chunk
        for reading in self.readings:
            if not room:
                break
            end = min(len(reading.prompt), reading.position + room)
            room -= end - reading.position
            chunks.append(PrefillChunk(reading, reading.position, end))
        return tuple(chunks)


def _rank(ticket: Ticket) -> tuple[bool, int]:
    return not ticket.request.under_way, ticket.number


def _seniority(item: ActiveSequence | PrefillRequest) -> tuple[bool, int, int]:
    sample = item.sample if isinstance(item, ActiveSequence) else item.samples[-1]
    return (*_rank(item.ticket), sample)


def _next_size(row: ActiveSequence) -> int:
    have = sum(segment.capacity for segment in row.own)
    return max(1, min(row.ticket.request.max_tokens - have, max(have, FIRST_SLOTS)))
