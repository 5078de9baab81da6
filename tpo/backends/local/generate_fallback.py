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
from tpo.backends.local.requests import Completion, EngineRequest, RequestMetrics, RequestOutput, TokenRequest
from tpo.backends.local.sampling import Sampler
from tpo.core.errors import BackendUnavailableError

_log = logging.getLogger(__name__)


class GenerateEngine:
    """Engine for any causal language model of transformers."""

    def __init__(self, model: Any, stop_tokens: frozenset[int], context: int) -> None:
        self.capacity = context
        self._model = model
        self._stop = stop_tokens
        self._queue: queue.SimpleQueue[EngineRequest | None] = queue.SimpleQueue()
        self._stop_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False when the engine has stopped."""
        return self._stop_reason is None and self._thread.is_alive()

    def submit(self, request: TokenRequest) -> "Future[RequestOutput]":
        """Queue a request and return the future of its output.

        Raises BackendUnavailableError if the engine has stopped.
        """
        if self._stop_reason:
            raise BackendUnavailableError(self._stop_reason)
        queued = EngineRequest(request, 0, RequestMetrics(time.monotonic()))
        self._queue.put(queued)
        return queued.future

    def close(self) -> None:
        """Stop the engine after the current token."""
        self._stop_reason = "The engine was closed."
        self._queue.put(None)
        self._thread.join()
        while not self._queue.empty():
            if request := self._queue.get():
                fail(request.future, BackendUnavailableError(self._stop_reason))

    def _run(self) -> None:
        while request := self._queue.get():
            if request.is_finished:
                continue
            try:
                output = self._generate(request)
            except Exception as error:
                if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                    self._stop_reason = f"The device has failed and this process must be restarted: {error!r}"
                    _log.critical("the policy's device has failed", exc_info=error)
                fail(request.future, BackendUnavailableError(f"The policy failed: {error!r}"))
                continue
            if self._stop_reason:
                fail(request.future, BackendUnavailableError(self._stop_reason))
            succeed(request.future, output)

    def _generate(self, request: EngineRequest) -> RequestOutput:
        inputs, model = request.inputs, self._model
        request.metrics.started_at = time.monotonic()
        n, length = len(inputs.seeds), len(inputs.prompt)
        prompt = torch.tensor([inputs.prompt] * n, device=model.device)
        sampler = Sampler(inputs.seeds, [inputs.temperature] * n, [inputs.top_p] * n, model.device)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=inputs.max_tokens,
                eos_token_id=sorted(self._stop) or None,
                pad_token_id=min(self._stop, default=0),
                logits_processor=LogitsProcessorList([_GumbelSampler(sampler, length)]),
                stopping_criteria=StoppingCriteriaList(
                    [_StopWhen(lambda: request.is_finished or self._stop_reason is not None)]
                ),
            )
        request.metrics.finished_at = time.monotonic()
        return RequestOutput(tuple(self._completion(row[length:].tolist()) for row in out), request.metrics)

    def _completion(self, tokens: list[int]) -> Completion:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._stop), None)
        return Completion(tuple(tokens[:end]), "stop" if end else "length")


class _GumbelSampler(LogitsProcessor):
    """Logits processor that masks all tokens except the one drawn by the engine's sampler."""

    def __init__(self, sampler: Sampler, prompt_length: int) -> None:
        self._sampler = sampler
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full((len(scores),), input_ids.shape[1] - self._prompt_length, device=scores.device)
        drawn = self._sampler(scores, steps).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _StopWhen(StoppingCriteria):
    """Stopping criterion that ends the whole batch between two tokens when `condition` returns True."""

    def __init__(self, condition: Any) -> None:
        self._condition = condition

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), bool(self._condition()), device=input_ids.device)
