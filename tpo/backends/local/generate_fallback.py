"""Fallback for models that the engine cannot serve: transformers' own `generate`, one request at a time.

It is slower than the engine and must be enabled with TPO_ENGINE_FALLBACK. Seeds have the same meaning as in the engine.
"""

import logging
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tpo.backends.futures import fail, succeed
from tpo.backends.local.engine import is_out_of_memory
from tpo.backends.local.requests import Answer, Completion, Ticket, Timings, TokenRequest
from tpo.backends.local.sampling import Sampler
from tpo.core.errors import BackendUnavailableError

_log = logging.getLogger(__name__)


class GenerateEngine:
    """Engine for any causal language model of transformers."""

    def __init__(self, model: Any, stop_tokens: frozenset[int], context: int) -> None:
        self.capacity = context
        self._model = model
        self._stop = stop_tokens
        self._waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the thread has ended."""
        return self._ended is None and self._thread.is_alive()

    def submit(self, request: TokenRequest) -> "Future[Answer]":
        """Queue a request and return the future of its answer.

        Raises BackendUnavailableError if the engine has ended.
        """
        if self._ended:
            raise BackendUnavailableError(self._ended)
        ticket = Ticket(request, 0, Timings(time.monotonic()))
        self._waiting.put(ticket)
        return ticket.future

    def close(self) -> None:
        """Stop the engine after the current token."""
        self._ended = "The engine was closed."
        self._waiting.put(None)
        self._thread.join()
        while not self._waiting.empty():
            if ticket := self._waiting.get():
                fail(ticket.future, BackendUnavailableError(self._ended))

    def _run(self) -> None:
        while ticket := self._waiting.get():
            if ticket.is_done:
                continue
            try:
                answer = self._answer(ticket)
            except Exception as error:
                if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                    self._ended = f"The device has failed and this process must be restarted: {error!r}"
                    _log.critical("the policy's device has failed", exc_info=error)
                fail(ticket.future, BackendUnavailableError(f"The policy failed: {error!r}"))
                continue
            if self._ended:
                fail(ticket.future, BackendUnavailableError(self._ended))
            succeed(ticket.future, answer)

    def _answer(self, ticket: Ticket) -> Answer:
        request, model = ticket.request, self._model
        ticket.timings.started = time.monotonic()
        n, length = len(request.seeds), len(request.prompt)
        prompt = torch.tensor([request.prompt] * n, device=model.device)
        sampler = Sampler(request.seeds, [request.temperature] * n, [request.top_p] * n, model.device)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=request.max_tokens,
                eos_token_id=sorted(self._stop) or None,
                pad_token_id=min(self._stop, default=0),
                logits_processor=LogitsProcessorList([_GumbelSampler(sampler, length)]),
                stopping_criteria=StoppingCriteriaList(
                    [_StopTokens(lambda: ticket.is_done or self._ended is not None)]
                ),
            )
        ticket.timings.finished = time.monotonic()
        return Answer(tuple(self._completion(row[length:].tolist()) for row in out), ticket.timings)

    def _completion(self, tokens: list[int]) -> Completion:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._stop), None)
        return Completion(tuple(tokens[:end]), "stop" if end else "length")


class _GumbelSampler(LogitsProcessor):
    """Logits processor that leaves only the token chosen by the engine's sampler."""

    def __init__(self, sampler: Sampler, prompt: int) -> None:
        self._sampler = sampler
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full((len(scores),), input_ids.shape[1] - self._prompt, device=scores.device)
        drawn = self._sampler(scores, steps).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _StopTokens(StoppingCriteria):
    """Stopping criterion that ends the whole batch between two tokens when `is_over` returns True."""

    def __init__(self, is_over: Any) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), bool(self._is_over()), device=input_ids.device)
