"""The step loop: one thread that asks the scheduler what to do and lets the runner do it. Tokens in, tokens out."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tpo.backends.futures import fail
from tpo.backends.local.requests import Answer, Ticket, Timings, TokenRequest
from tpo.backends.local.runner import Runner
from tpo.backends.local.scheduler import Limits, PrefillChunk, Scheduler
from tpo.backends.local.watchdog import Watchdog
from tpo.core.errors import BackendUnavailableError, BadReplyError, ContextTooLongError, PromptRefusedError, TPOError

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StepEngine:
    """Requests of many threads, whose samples join and leave between two tokens."""

    def __init__(self, runner: Runner, limits: Limits, stop_tokens: frozenset[int]) -> None:
        self.capacity = limits.tokens
        """Tokens that one sequence may have at most, with its answer."""
        self.attention = runner.attention
        self.seconds = {"schedule": 0.0, "prefill": 0.0, "decode": 0.0}
        """Where the loop's time went so far."""
        self.steps = 0
        """Steps that wrote tokens."""
        self._runner = runner
        self._scheduler = Scheduler(limits, stop_tokens)
        self._changed = threading.Condition()
        self._arrived: list[Ticket] = []
        self._count = 0
        self._ended: str | None = None
        self._pulse = Watchdog()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the loop has ended, or is stuck."""
        return self._ended is None and not self._pulse.stuck

    @property
    def rows(self) -> int:
        """Samples that are being written now."""
        return len(self._scheduler.rows)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are in memory or have room there, what is kept for later calls included."""
        arena = self._scheduler.arena
        return arena.size - arena.free

    def submit(self, request: TokenRequest) -> "Future[Answer]":
        """Queue a request and return the answer to come.

        Raises BackendUnavailableError when the loop has ended, ContextTooLongError, PromptRefusedError.
        """
        if not request.prompt or not 0 <= min(request.prompt) <= max(request.prompt) < self._runner.vocabulary:
            raise PromptRefusedError("A prompt needs tokens that the policy knows, and at least one.")
        if len(request.prompt) + request.max_tokens > self.capacity + 1:
            raise ContextTooLongError(
                f"A prompt of {len(request.prompt)} tokens and an answer of {request.max_tokens} are more than the "
                f"engine's memory holds, which is {self.capacity}. Raise TPO_CACHE_GIB, or lower max_tokens."
            )
        with self._changed:
            if self._ended:
                raise BackendUnavailableError(self._ended)
            self._count += 1
            ticket = Ticket(request, self._count, Timings(time.monotonic()), list(range(len(request.seeds))))
            self._arrived.append(ticket)
            self._changed.notify()
        return ticket.future

    def close(self) -> None:
        """End the loop after the step that runs."""
        self._end("The engine was closed.")
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._step()
        except BaseException as error:
            _log.critical("the engine's loop has died", exc_info=error)
            self._end(f"The engine's loop has died and this process must be started anew: {error!r}")
        finally:
            for ticket in self._scheduler.clear():
                fail(ticket.future, BackendUnavailableError(self._ended))
            self._runner.forget()

    def _end(self, why: str) -> None:
        with self._changed:
            self._ended = self._ended or why
            for ticket in self._arrived:
                fail(ticket.future, BackendUnavailableError(self._ended))
            self._arrived = []
            self._changed.notify()

    def _wait(self) -> bool:
        """Sleep until there is work; False when the loop has to end."""
        self._pulse.rest()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._arrived or self._scheduler.busy)
            for ticket in self._arrived:
                self._scheduler.add(ticket)
            self._arrived = []
            return self._ended is None

    def _step(self) -> None:
        self._pulse.beat()
        scheduler = self._scheduler
        plan = self._timed("schedule", scheduler.plan)
        try:
            if plan.chunks:
                self._timed("prefill", lambda: self._read(plan.chunks))
            if plan.rows:
                tokens = self._timed("decode", lambda: self._runner.decode(plan.rows))
                for row, token in zip(plan.rows, tokens, strict=True):
                    if token < 0:
                        fail(row.ticket.future, BadReplyError(_NO_NUMBERS))
                self.steps += 1
                self._timed("schedule", lambda: scheduler.advance(plan.rows, tokens))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._make_room(error)

    def _read(self, chunks: Sequence[PrefillChunk]) -> None:
        """Read parts of prompts. Where that breaks, one by one: whoever breaks alone fails alone."""
        try:
            logits = self._runner.prefill(chunks)
        except Exception as error:
            if is_out_of_memory(error) or _is_of_the_device(error):
                raise
            if len(chunks) > 1:
                for chunk in chunks:
                    self._read([chunk])
            else:
                fail(chunks[0].reading.ticket.future, BackendUnavailableError(f"The policy failed: {error!r}"))
            return
        self._scheduler.read(chunks)
        for chunk, row in zip([c for c in chunks if c.last], logits, strict=True):
            reading = chunk.reading
            first = self._runner.first_tokens(row, reading.ticket.request, reading.samples)
            if min(first) < 0:
                fail(reading.ticket.future, BadReplyError(_NO_NUMBERS))
            self._scheduler.join(reading, first)

    def _make_room(self, error: Exception) -> None:
        """The device has no memory left: the youngest quarter begins again later; what is alone has failed."""
        _log.warning("out of memory in a step: the youngest samples are put back")
        self._runner.forget()
        working = len(self._scheduler.rows) + len(self._scheduler.readings)
        if not all(self._scheduler.preempt_youngest() for _ in range(max(1, working // 4))):
            for ticket in (*(r.ticket for r in self._scheduler.rows), *(r.ticket for r in self._scheduler.readings)):
                fail(ticket.future, out_of_memory(error))

    def _timed(self, what: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds[what] += time.perf_counter() - started
        return result


_NO_NUMBERS = "The policy's logits are not numbers: its weights overflow in this dtype. Use float32."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch has one class for this and does not always use it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def out_of_memory(error: Exception) -> TPOError:
    """What a job is told when even a request alone did not fit."""
    return BackendUnavailableError(
        "The policy ran out of memory with one sample alone. Lower TPO_CACHE_GIB, TPO_PREFILL_TOKENS or the request's "
        f"max_tokens. {error}"
    )


def _is_of_the_device(error: Exception) -> bool:
    """Whether the accelerator itself has failed: such an error stays, and every further request would meet it."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
