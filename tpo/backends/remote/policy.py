"""Any server that speaks OpenAI's chat completions as policy: vLLM, SGLang, llama.cpp, a hosted one."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from tpo.backends.remote.connection import connect, limits_of, secret
from tpo.backends.remote.context import refuses_n, too_long
from tpo.backends.remote.reply import Reply, estimated, read_completion
from tpo.backends.remote.server import Refused, Server, all_of
from tpo.core.errors import (
    BackendUnavailableError,
    BadReplyError,
    ContextTooLongError,
    ModelRefusedError,
    PromptRefusedError,
)
from tpo.core.ports import Generate, Generation, Interrupt, Text, cut_at
from tpo.settings import Settings

_log = logging.getLogger(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SEED_BITS = 2**31 - 1
"""llama.cpp's seeds have 32 bits, and vLLM counts upwards from a request's seed."""

_ASKED_AGAIN = 3
_SHOWN = 300
_WRONG_KEY = (401, 403)
_NOT_NOW = {404: "knows no such model or address", 429: "says that its quota is used up"}


class OpenAIPolicy:
    """A model behind `/v1/chat/completions`. Any thread may call."""

    healthy = True

    def __init__(self, model: str, server: Server, settings: Settings) -> None:
        self._model = model
        self._server = server
        self._apart = settings.openai_samples == "separate"
        self._warned = False
        self._limit_name = settings.openai_max_tokens_field
        self._extra = settings.openai_extra_body

    @classmethod
    def load(cls, model: str, settings: Settings) -> Self:
        """Wait until the server answers, and see that it has the model. Raises ModelRefusedError."""
        if settings.openai_url is None:
            raise ModelRefusedError(
                f"The policy openai:{model} needs TPO_OPENAI_URL, the address of its server: http://host:8000/v1"
            )
        server = Server(settings.openai_url, secret(settings.openai_api_key), limits_of(settings))
        try:
            connect(server, model, settings.remote_start_seconds, setting="TPO_OPENAI_API_KEY")
        except BaseException:
            server.close()
            raise
        return cls(model, server, settings)

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Sample responses.

        Raises ContextTooLongError, PromptRefusedError, BadReplyError, BackendUnavailableError, CallInterruptedError.

        An interrupt closes the connection, so that the server stops writing.
        """
        started = time.perf_counter()
        interrupt()
        if any(_LONE_SURROGATE.search(m.content) for m in request.messages):
            raise PromptRefusedError("A message holds half a surrogate pair, which is no Unicode text.")
        replies = self._server.call(self._sample(request), interrupt)
        texts = tuple(_before(request.stop, text) for reply in replies for text in reply.texts)
        if request.temperature == 0:
            texts *= request.n
        read = [r.input_tokens for r in replies if r.input_tokens is not None]
        return Generation(
            texts=texts,
            input_tokens=max(read, default=estimated(sum(len(m.content) for m in request.messages))),
            seconds=time.perf_counter() - started,
            reasoning_tokens=sum(r.reasoning_tokens for r in replies),
        )

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    async def _sample(self, request: Generate) -> list[Reply]:
        """As many texts as seeds, in their order; a single one where the seed does not matter."""
        if request.temperature == 0:
            return [await self._one(request, request.seeds[0])]
        got: list[Reply] = []
        if not self._apart and request.n > 1:
            reply = await self._ask(request, request.seeds[0], request.n)
            got.append(reply)
            if len(reply.texts) < request.n and not self._warned:
                self._warned = True
                _log.warning(
                    "the policy's server gives fewer choices than n; TPO_OPENAI_SAMPLES=separate is faster with it"
                )
        missing = request.seeds[sum(len(reply.texts) for reply in got) :]
        return got + await all_of(lambda seed: self._one(request, seed), missing)

    async def _one(self, request: Generate, seed: int) -> Reply:
        """One text; asked for again where the server answers without any."""
        for _ in range(_ASKED_AGAIN):
            reply = await self._ask(request, seed, 1)
            if reply.texts:
                return reply
        raise BadReplyError(f"The policy's server answered {_ASKED_AGAIN} times without any response.")

    async def _ask(self, request: Generate, seed: int, n: int) -> Reply:
        """At most n texts of one request, none where the server takes no such n.

        With fewer tokens to write where the context has no room for all.
        """
        body = self._body(request, seed, n)
        while True:
            try:
                reply = await self._server.post("chat/completions", body, read_completion)
                return replace(reply, texts=reply.texts[:n])
            except Refused as refused:
                if n > 1 and refuses_n(refused):
                    return Reply((), None, 0)
                body[self._limit_name] = self._room(request, refused, body[self._limit_name])

    def _room(self, request: Generate, refused: Refused, limit: int) -> int:
        """A lower limit that may fit. Raises what the refusal means where none does."""
        if refused.status in _WRONG_KEY:
            raise BackendUnavailableError(
                f"The policy's server refused the key ({refused.status}): set TPO_OPENAI_API_KEY."
            ) from refused
        if refused.status < 400 or refused.status in _NOT_NOW:
            why = _NOT_NOW.get(refused.status, "sends elsewhere: TPO_OPENAI_URL has to name that address itself")
            raise BackendUnavailableError(f"The policy's server {why} ({refused.status}).") from refused
        length = too_long(refused)
        if length is None:
            raise PromptRefusedError(
                f"The policy's server refused the {request.kind} call ({refused.status}): {refused.said[:_SHOWN]}"
            ) from refused
        if length.window is not None:
            # Where the prompt's length is not said, the whole window: vLLM lowers what is within that by itself.
            room = length.window - (length.sent or 0)
            if 0 < room < limit:
                return room
            limit = min(limit, room)
        if limit > 1 and not length.alone:
            return limit // 2
        has = "more tokens than fit" if length.sent is None else f"{length.sent} tokens"
        holds = "its window" if length.window is None else f"{length.window} with its answer"
        raise ContextTooLongError(
            f"The prompt of the {request.kind} call has {has}; the policy holds {holds}. Shorten the conversation, or "
            "lower max_tokens so that the responses which the critic reads are shorter."
        ) from refused

    def _body(self, request: Generate, seed: int, n: int) -> dict[str, Any]:
        return {
            **self._extra,
            "model": self._model,
            "messages": [m.model_dump() for m in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": seed & _SEED_BITS,
            self._limit_name: request.max_tokens,
            **({"n": n} if n > 1 else {}),
            **({"stop": list(request.stop)} if request.stop else {}),
        }


def _before(stop: Sequence[str], text: Text) -> Text:
    """The text up to a stop string: the server of transformers leaves it at the end."""
    kept = cut_at(text.text, stop)
    return text if kept == text.text else Text(text=kept, finish_reason="stop", tokens=text.tokens)
