"""Policy on this machine: encodes messages, runs the engine and decodes its tokens."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Self

from tpo.backends.futures import result_of
from tpo.backends.local.factory import EngineOptions, build_engine
from tpo.backends.local.generate_fallback import GenerateEngine
from tpo.backends.local.loader import Model, load_policy_model
from tpo.backends.local.requests import Completion, Engine, TokenRequest
from tpo.backends.reasoning import split_reasoning
from tpo.core.errors import ContextTooLongError, ModelRefusedError, PromptRefusedError
from tpo.core.ports import Generate, Generation, Interrupt, Text, cut_at
from tpo.settings import Settings

_log = logging.getLogger(__name__)

_OVERLAP_TOKENS = 8
"""Extra tokens decoded before a possible stop string, because decoding from the middle of a text may lose its first
character."""


class LocalPolicy:
    """A causal language model behind one engine. Thread-safe."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self._model = model
        self._engine = engine
        self._context = min(model.context, engine.capacity)

    @classmethod
    def load(cls, spec: str, settings: Settings) -> Self:
        """Load the weights, start the engine and verify it. Raises ModelRefusedError if that fails."""
        model = load_policy_model(spec, settings)
        return cls(model, _engine(model, settings))

    @property
    def healthy(self) -> bool:
        """False when the engine cannot serve further requests."""
        return self._engine.healthy

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Sample responses.

        In float32 the same seed gives the same text, whatever else is in the batch; in lower precision, nearly always.

        Raises ContextTooLongError, PromptRefusedError, BadReplyError, BackendUnavailableError, CallInterruptedError.
        """
        started = time.perf_counter()
        interrupt()
        prompt = self._prompt(request)
        opened = self._model.chat.opens_thinking(prompt)
        future = self._engine.submit(
            TokenRequest(
                prompt=tuple(prompt),
                seeds=request.seeds,
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=min(request.max_tokens, self._context - len(prompt)),
                stop_check=self._stop_check(request.stop, opened=opened) if request.stop else None,
                is_continuation=request.kind != "sample" or request.iteration > 0,
            )
        )
        completions = result_of(future, interrupt).completions
        texts = tuple(self._text(completion, request.stop, opened=opened) for completion in completions)
        return Generation(
            texts=texts,
            input_tokens=len(prompt),
            seconds=time.perf_counter() - started,
            reasoning_tokens=sum(len(c.tokens) for c in completions) - sum(t.tokens for t in texts),
        )

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _prompt(self, request: Generate) -> list[int]:
        prompt = self._model.chat.encode(request.messages, for_reply=True)
        context = self._context
        if len(prompt) >= context:
            raise ContextTooLongError(
                f"The prompt of the {request.kind} call has {len(prompt)} tokens; the policy holds {context} with its "
                f"answer, so at most {context - 1} fit. Shorten the conversation, or lower max_tokens so that the "
                "responses in the critique prompt are shorter."
            )
        if max(prompt) >= self._model.vocabulary:
            raise PromptRefusedError(
                f"The tokenizer produced token {max(prompt)}, but the policy knows only {self._model.vocabulary} "
                "tokens. Use the tokenizer that belongs to the model."
            )
        return prompt

    def _stop_check(self, stop: tuple[str, ...], *, opened: bool) -> Callable[[Sequence[int]], bool]:
        """Build a function that returns whether the text of a completion contains a stop string after its reasoning.

        A token has at least one byte, so only the last tokens need to be decoded.
        """
        chat = self._model.chat
        longest = max(len(s.encode()) for s in stop) + _OVERLAP_TOKENS

        def is_complete(tokens: Sequence[int]) -> bool:
            if not any(s in chat.decode(tokens[-longest:]) for s in stop):
                return False
            content = split_reasoning(chat.decode(tokens), opened=opened)[0]
            return cut_at(content, stop) != content

        return is_complete

    def _text(self, completion: Completion, stop: tuple[str, ...], *, opened: bool) -> Text:
        decoded = self._model.chat.decode(completion.tokens)
        content = split_reasoning(decoded, opened=opened)[0]
        text = cut_at(content, stop)
        tokens = len(completion.tokens) if content == decoded else self._model.chat.count(text)
        return Text(text=text, finish_reason=completion.finish_reason if text == content else "stop", tokens=tokens)


def _engine(model: Model, settings: Settings) -> Engine:
    """Build the engine, or the fallback if the settings allow it."""
    options = EngineOptions(settings.batch_rows, settings.cache_gib, settings.prefill_tokens)
    try:
        return build_engine(model.network, model.stop_tokens, model.context, options, f"The policy {model.name}")
    except ModelRefusedError as error:
        if not settings.engine_fallback:
            raise
        _log.warning("%s Falling back to `generate`, one request at a time.", error)
        return GenerateEngine(model.network, model.stop_tokens, model.context)
