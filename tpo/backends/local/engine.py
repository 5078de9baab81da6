"""Step loop of the engine: one thread asks the scheduler for a plan and lets the runner execute it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from tpo.backends.futures import fail
from tpo.backends.local.requests import EngineRequest, RequestMetrics, RequestOutput, TokenRequest
from tpo.backends.local.runner import Runner
from tpo.backends.local.scheduler import PrefillChunk, Scheduler, SchedulerConfig
from tpo.backends.local.watchdog import Watchdog
from tpo.core.errors import BackendUnavailableError, BadReplyError, ContextTooLongError, PromptRefusedError, TPOError

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StepEngine:
    """Continuous batching engine: samples of many threads join and leave the batch between two tokens."""

    def __init__(self, runner: Runner, config: SchedulerConfig, stop_tokens: frozenset[int]) -> None:
        self.capacity = config.cache_slots
        """Maximum tokens of one sequence, prompt and completion together."""
        self.attention = runner.attention
        self.phase_seconds = {"schedule": 0.0, "prefill": 0.0, "decode": 0.0}
        """Seconds that the loop has spent in each phase."""
        self.steps = 0
        """Number of decode steps."""
        self._runner = runner
        self._scheduler = Scheduler(config, stop_tokens)
        self._changed = threading.Condition()
        self._submitted: list[EngineRequest] = []
        self._last_number = 0
        self._stop_reason: str | None = None
        self._watchdog = Watchdog()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the loop has stopped or a forward pass hangs."""
        return self._stop_reason is None and not self._watchdog.expired

    @property
    def running_sequences(self) -> int:
        """Number of samples that are being decoded."""
        return len(self._scheduler.running)

    @property
    def used_slots(self) -> int:
        """Number of cache slots in use or reserved, including those of the prefix cache."""
        allocator = self._scheduler.allocator
        return allocator.size - allocator.free

    def submit(self, request: TokenRequest) -> "Future[RequestOutput]":
        """Queue a request and return the future of its output.

        Raises PromptRefusedError if the prompt is empty or has unknown tokens, ContextTooLongError if the request does
        not fit the cache, BackendUnavailableError if the loop has stopped.
        """
        if not request.prompt or not 0 <= min(request.prompt) <= max(request.prompt) < self._runner.vocabulary:
            raise PromptRefusedError(
                "A prompt must have at least one token, and only tokens of the policy's vocabulary."
            )
        if len(request.prompt) + request.max_tokens > self.capacity + 1:
            raise ContextTooLongError(
                f"A prompt of {len(request.prompt)} tokens and a completion of {request.max_tokens} do not fit the "
                f"engine's memory, which holds {self.capacity} tokens. Raise TPO_CACHE_GIB, or lower max_tokens."
            )
        with self._changed:
            if self._stop_reason:
                raise BackendUnavailableError(self._stop_reason)
            self._last_number += 1
            metrics, samples = RequestMetrics(time.monotonic()), list(range(len(request.seeds)))
            queued = EngineRequest(request, self._last_number, metrics, samples)
            self._submitted.append(queued)
            self._changed.notify()
        return queued.future

    def close(self) -> None:
        """Stop the loop after the current step."""
        self._stop("The engine was closed.")
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._step()
        except BaseException as error:
            _log.critical("the engine's loop has died", exc_info=error)
            self._stop(f"The engine's loop has died and this process must be restarted: {error!r}")
        finally:
            for request in self._scheduler.clear():
                fail(request.future, BackendUnavailableError(self._stop_reason))
            self._runner.reset()

    def _stop(self, reason: str) -> None:
        """Make the loop stop, and fail the requests that the loop has not taken yet."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            for request in self._submitted:
                fail(request.future, BackendUnavailableError(self._stop_reason))
            self._submitted = []
            self._changed.notify()

    def _wait(self) -> bool:
        """Wait for work. Return False when the loop must stop."""
        self._watchdog.disarm()
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason or self._submitted or self._scheduler.has_work)
            for request in self._submitted:
                self._scheduler.add(request)
            self._submitted = []
            return self._stop_reason is None

    def _step(self) -> None:
        """Run one step: plan, prefill, decode. If memory runs out, preempt samples."""
        self._watchdog.arm()
        scheduler = self._scheduler
        plan = self._timed("schedule", scheduler.plan)
        try:
            if plan.chunks:
                self._timed("prefill", lambda: self._prefill(plan.chunks))
            if plan.sequences:
                tokens = self._timed("decode", lambda: self._runner.decode(plan.sequences))
                for sequence, token in zip(plan.sequences, tokens, strict=True):
                    if token < 0:
                        fail(sequence.request.future, BadReplyError(_NON_FINITE))
                self.steps += 1
                self._timed("schedule", lambda: scheduler.append_tokens(plan.sequences, tokens))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._recover_from_out_of_memory(error)

    def _prefill(self, chunks: Sequence[PrefillChunk]) -> None:
        """Prefill chunks together. If that fails, prefill them one by one, so that only the faulty request fails."""
        try:
            logits = self._runner.prefill(chunks)
        except Exception as error:
            if is_out_of_memory(error) or _is_device_failure(error):
                raise
            if len(chunks) > 1:
                for chunk in chunks:
                    self._prefill([chunk])
            else:
                fail(chunks[0].prefill.request.future, BackendUnavailableError(f"The policy failed: {error!r}"))
            return
        self._scheduler.record_prefilled(chunks)
        for prefill, last_logits in zip([c.prefill for c in chunks if c.is_last], logits, strict=True):
            first = self._runner.first_tokens(last_logits, prefill.request.inputs, prefill.samples)
            if min(first) < 0:
                fail(prefill.request.future, BadReplyError(_NON_FINITE))
            self._scheduler.start_decoding(prefill, first)

    def _recover_from_out_of_memory(self, error: Exception) -> None:
        """Preempt the youngest quarter of the active work. Fail a request that ran out of memory by itself."""
        _log.warning("out of memory in a step: preempting the youngest samples")
        self._runner.reset()
        scheduler = self._scheduler
        active = len(scheduler.running) + len(scheduler.prefilling)
        if not all(scheduler.preempt_youngest() for _ in range(max(1, active // 4))):
            for request in [item.request for item in scheduler.running] + [
                item.request for item in scheduler.prefilling
            ]:
                fail(request.future, out_of_memory(error))

    def _timed(self, phase: str, work: Callable[[], T]) -> T:
        """Call `work` and add its duration to the seconds of a phase."""
        started = time.perf_counter()
        result = work()
        self.phase_seconds[phase] += time.perf_counter() - started
        return result


_NON_FINITE = "The policy's logits are not finite numbers: its weights overflow in this dtype. Set TPO_DTYPE=float32."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory; torch does not always raise its own class for this."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def out_of_memory(error: Exception) -> TPOError:
    """Build the error for a request that does not fit the memory even by itself."""
    return BackendUnavailableError(
        "The policy ran out of memory with only one sample. Lower TPO_CACHE_GIB, TPO_PREFILL_TOKENS or the request's "
        f"max_tokens. {error}"
    )


def _is_device_failure(error: Exception) -> bool:
    """Return whether the accelerator itself has failed. Such an error persists and affects every later request."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
