"""Policy behind any server with OpenAI's chat completions API: vLLM, SGLang, llama.cpp or a hosted one."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from tpo.backends.messages import check_unicode
from tpo.backends.remote.connection import connect, limits_from_settings, secret
from tpo.backends.remote.context import refuses_n, too_long
from tpo.backends.remote.reply import Reply, estimate_tokens, read_completion
from tpo.backends.remote.server import Refused, Server, gather_all
from tpo.backends.spec import ModelSpec
from tpo.core.errors import (
    BackendUnavailableError,
    BadReplyError,
    ContextTooLongError,
    ModelRefusedError,
    PromptRefusedError,
)
from tpo.core.ports import Generate, Generation, Interrupt, Text, cut_at
from tpo.settings import OPENAI, Settings

_log = logging.getLogger(__name__)

_SEED_BITS = 2**31 - 1
"""Mask for seeds: llama.cpp's seeds have 32 bits, and vLLM counts upwards from a request's seed."""

_MAX_EMPTY_REPLIES = 3
_MAX_SHOWN = 300
_WRONG_KEY = (401, 403)
_UNAVAILABLE = {404: "has no such model or path", 429: "says that its quota is used up"}


class OpenAIPolicy:
    """A model behind `/v1/chat/completions`. Any thread may call."""

    healthy = True

    def __init__(self, spec: ModelSpec, server: Server) -> None:
        self._model = spec.name.removeprefix(OPENAI)
        self._server = server
        self._separate = spec.samples == "separate"
        self._warned = False
        self._max_tokens_field = spec.max_tokens_field
        self._extra_body = spec.extra_body

    @classmethod
    def load(cls, spec: ModelSpec, settings: Settings) -> Self:
        """Wait until the server answers, and check that it has the model. Raises ModelRefusedError otherwise."""
        if spec.url is None:
            raise ModelRefusedError(
                f"The policy {spec.name} needs the address of its server. Set TPO_OPENAI_URL, such as http://host:8000/v1."
            )
        server = Server(spec.url, secret(spec.api_key), limits_from_settings(settings))
        try:
            connect(server, spec.name.removeprefix(OPENAI), settings.remote_start_seconds, setting="TPO_OPENAI_API_KEY")
        except BaseException:
            server.close()
            raise
        return cls(spec, server)

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Sample responses.

        An interrupt closes the connection, so that the server stops generating.

        Raises ContextTooLongError, PromptRefusedError, BadReplyError, BackendUnavailableError, CallInterruptedError.
        """
        started = time.perf_counter()
        interrupt()
        check_unicode(request.messages)
        replies = self._server.call(self._sample(request), interrupt)
        texts = tuple(_cut_text(request.stop, text) for reply in replies for text in reply.texts)
        if request.temperature == 0:
            texts *= request.n
        input_tokens = [r.input_tokens for r in replies if r.input_tokens is not None]
        return Generation(
            texts=texts,
            input_tokens=max(input_tokens, default=estimate_tokens(sum(len(m.content) for m in request.messages))),
            seconds=time.perf_counter() - started,
            reasoning_tokens=sum(r.reasoning_tokens for r in replies),
        )

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    async def _sample(self, request: Generate) -> list[Reply]:
        """Return one text for each seed, in their order; a single text if the temperature is 0."""
        if request.temperature == 0:
            return [await self._request_one(request, request.seeds[0])]
        replies: list[Reply] = []
        if not self._separate and request.n > 1:
            reply = await self._request(request, request.seeds[0], request.n)
            replies.append(reply)
            if len(reply.texts) < request.n and not self._warned:
                self._warned = True
                _log.warning("the policy's server returns fewer choices than n; TPO_OPENAI_SAMPLES=separate is faster")
        missing = request.seeds[sum(len(reply.texts) for reply in replies) :]
        return replies + await gather_all(lambda seed: self._request_one(request, seed), missing)

    async def _request_one(self, request: Generate, seed: int) -> Reply:
        """Request one text; retry if the server answers without any."""
        for _ in range(_MAX_EMPTY_REPLIES):
            reply = await self._request(request, seed, 1)
            if reply.texts:
                return reply
        raise BadReplyError(f"The policy's server answered {_MAX_EMPTY_REPLIES} times without any response.")

    async def _request(self, request: Generate, seed: int, n: int) -> Reply:
        """Request n texts at once and return at most n; return none if the server does not support this n.

        If the context window is too small, retry with a lower limit of output tokens.
        """
        body = self._body(request, seed, n)
        while True:
            try:
                reply = await self._server.post("chat/completions", body, read_completion)
                return replace(reply, texts=reply.texts[:n])
            except Refused as refused:
                if n > 1 and refuses_n(refused):
                    return Reply((), None, 0)
                body[self._max_tokens_field] = self._lower_limit(request, refused, body[self._max_tokens_field])

    def _lower_limit(self, request: Generate, refused: Refused, limit: int) -> int:
        """Return a lower limit of output tokens that may fit.

        Raises the error that the refusal stands for if no lower limit can help.
        """
        if refused.status in _WRONG_KEY:
            raise BackendUnavailableError(
                f"The policy's server refused the key ({refused.status}). Set TPO_OPENAI_API_KEY."
            ) from refused
        if refused.status < 400 or refused.status in _UNAVAILABLE:
            why = _UNAVAILABLE.get(refused.status, "redirects elsewhere: TPO_OPENAI_URL must be the final address")
            raise BackendUnavailableError(f"The policy's server {why} ({refused.status}).") from refused
        length = too_long(refused)
        if length is None:
            raise PromptRefusedError(
                f"The policy's server refused the {request.kind} call ({refused.status}): "
                f"{refused.message[:_MAX_SHOWN]}"
            ) from refused
        if length.window is not None:
            # If the prompt's length is unknown, try the whole window: vLLM itself lowers a limit within the window.
            remaining = length.window - (length.sent or 0)
            if 0 < remaining < limit:
                return remaining
            limit = min(limit, remaining)
        if limit > 1 and not length.prompt_only:
            return limit // 2
        has = "more tokens than fit" if length.sent is None else f"{length.sent} tokens"
        holds = "its window" if length.window is None else f"{length.window} with its answer"
        raise ContextTooLongError(
            f"The prompt of the {request.kind} call has {has}; the policy holds {holds}. Shorten the conversation, or "
            "lower max_tokens so that the responses in the critique prompt are shorter."
        ) from refused

    def _body(self, request: Generate, seed: int, n: int) -> dict[str, Any]:
        return {
            **self._extra_body,
            "model": self._model,
            "messages": [m.model_dump() for m in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": seed & _SEED_BITS,
            self._max_tokens_field: request.max_tokens,
            **({"n": n} if n > 1 else {}),
            **({"stop": list(request.stop)} if request.stop else {}),
        }


def _cut_text(stop: Sequence[str], text: Text) -> Text:
    """Cut the text before a stop string: the server of transformers leaves the stop string at the end."""
    kept = cut_at(text.text, stop)
    return text if kept == text.text else Text(text=kept, finish_reason="stop", tokens=text.tokens)
