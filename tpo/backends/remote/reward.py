"""Reward models behind HTTP: vLLM's `/classify` and `/pooling`, SGLang's `/classify`. The score is the raw logit.

A server that applies a sigmoid makes ties of all good responses (every raw score above 17 becomes 1.0), so that no
sigmoid is asked for, and scores that all lie in [0, 1] are refused.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Self

from tpo.backends.remote.apis import Scored, ScoringApi, SglangClassify, VllmClassify, VllmPooling, load_chat
from tpo.backends.remote.connection import connect, limits_of, secret
from tpo.backends.remote.context import TooLong, too_long
from tpo.backends.remote.server import Refused, Server, all_of
from tpo.core.errors import (
    BackendUnavailableError,
    BadReplyError,
    ContextTooLongError,
    ModelRefusedError,
    PromptRefusedError,
)
from tpo.core.ports import Interrupt, Rewards, Score
from tpo.core.state import Message, RewardPart
from tpo.settings import Settings

PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of France?", "No."),
    ("How do I boil an egg?", "Put it in boiling water for eight minutes, then cool it under cold water."),
    ("How do I boil an egg?", "egg egg egg egg egg egg egg egg"),
    ("Write a short thank-you note.", "Thank you so much for your kind help last week. It meant a lot to me."),
    ("Write a short thank-you note.", "Go away, I will not help you, you idiot."),
)
"""Scored once at the start: raw scores of such different responses do not all lie between 0 and 1."""

IN_UNIT_INTERVAL_IN_A_ROW = 256
"""So many scores in [0, 1] with none outside: the server has been started anew, with a sigmoid."""

_SIGMOID = (
    "gives scores between 0 and 1 alone: it applies a sigmoid, under which the best responses are all equal. Update "
    "it to a version that honours use_activation: false, or start vLLM with "
    "--pooler-config '{\"use_activation\": false}'. If its raw scores do lie there: TPO_REWARD_IN_UNIT_INTERVAL=true."
)
_MARGIN = 0.97
_MOST_CUTS = 24
_SHOWN = 300


class RemoteRewardModel:
    """A sequence classifier with one label behind HTTP. Any thread may call.

    Each response is a request of its own: the server batches those of all jobs.
    """

    def __init__(
        self, model: str, server: Server, kind: ScoringApi, *, bounded: bool, window: int | None = None
    ) -> None:
        self._model = model
        self._server = server
        self._kind = kind
        self._bounded = bounded
        self._window = window
        self._lock = threading.Lock()
        self._in_bounds = 0
        self.healthy = True
        """False once the server gives probabilities: the process ends, and the next start says why."""

    @classmethod
    def load(cls, spec: str, settings: Settings) -> Self:
        """Wait until the server answers, and see that its scores are raw. Raises ModelRefusedError."""
        kind_name, _, model = spec.partition(":")
        if settings.reward_url is None:
            raise ModelRefusedError(
                f"The reward model {spec} needs TPO_REWARD_URL, the address of its server: http://host:8000"
            )
        kind: ScoringApi
        match kind_name:
            case "vllm":
                kind = VllmClassify()
            case "vllm-pooling":
                kind = VllmPooling(settings.reward_task)
            case _:
                kind = SglangClassify(load_chat(settings.reward_tokenizer or model))
        server = Server(settings.reward_url, secret(settings.reward_api_key), limits_of(settings))
        try:
            seconds = settings.remote_start_seconds
            window = connect(server, model, seconds, setting="its API key", path="v1/models")
            reward = cls(model, server, kind, bounded=settings.reward_in_unit_interval, window=window)
            reward.probe()
        except BaseException:
            server.close()
            raise
        return reward

    def probe(self) -> None:
        """Score a few very different responses. Raises ModelRefusedError for a server that applies a sigmoid."""
        turns = [(Message(role="user", content=q), Message(role="assistant", content=a)) for q, a in PROBES]
        try:
            work = all_of(self._ask, turns)
            values = [scored.value for scored in self._server.call(work, lambda: None)]
        except Refused as refused:
            raise ModelRefusedError(
                f"The reward model {self._model} does not score over /{self._kind.path} ({refused.status}): "
                f"{refused.said[:_SHOWN]}"
            ) from refused
        except (BackendUnavailableError, BadReplyError) as error:
            raise ModelRefusedError(f"The reward model {self._model} does not score: {error}") from error
        if not self._bounded and all(0 <= value <= 1 for value in values):
            raise ModelRefusedError(f"The server of the reward model {self._model} {_SIGMOID}")

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses.

        Raises ContextTooLongError, PromptRefusedError, BadReplyError, BackendUnavailableError, CallInterruptedError.

        A response that the model's window has no room for is scored by its first part; its parts then say how much.
        """
        started = time.perf_counter()
        interrupt()
        work = all_of(lambda response: self._fitted(request.messages, response), request.responses)
        try:
            scored = self._server.call(work, interrupt)
        except ModelRefusedError as error:
            self.healthy = False
            raise BackendUnavailableError(str(error)) from error
        self._watch([one.value for one, _ in scored])
        cut = any(share < 1 for _, share in scored)
        return Rewards(
            values=tuple(one.value for one, _ in scored),
            input_tokens=sum(one.tokens for one, _ in scored),
            seconds=time.perf_counter() - started,
            parts=tuple(_parts(one.value, share) for one, share in scored) if cut else (),
        )

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    async def _fitted(self, messages: Sequence[Message], response: str) -> tuple[Scored, float]:
        """The score of what fits the window, and the share of the response that this is."""
        before = sum(len(m.content) for m in messages)
        kept = response
        halved: TooLong | None = None
        for _ in range(_MOST_CUTS):
            try:
                scored = await self._ask((*messages, Message(role="assistant", content=kept)))
            except Refused as refused:
                length = self._length(refused)
                halved = None if length.sent else length
                room = _room(length, before + len(kept)) - before if length.sent else len(kept) // 2
                kept = kept[: min(room, len(kept) - 1)] if room > 0 else ""
                if not kept:
                    break
            else:
                # A server that does not say how much too long it was counts what fits: that tells how much more does.
                more = _room(halved._replace(sent=scored.tokens), before + len(kept)) - before if halved else 0
                if more > len(kept):
                    with contextlib.suppress(Refused):
                        longer = response[:more]
                        scored = await self._ask((*messages, Message(role="assistant", content=longer)))
                        kept = longer
                return scored, len(kept) / len(response) if response else 1.0
        raise ContextTooLongError(
            f"The conversation has no room for a response in the window of the reward model"
            f"{f' ({length.window} tokens)' if length.window else ''}. Shorten it, or take a model that reads more."
        )

    def _length(self, refused: Refused) -> TooLong:
        """How much too long it was. Raises what else the refusal means."""
        if refused.status < 400 or refused.status in (401, 403, 404, 429):
            raise BackendUnavailableError(
                f"The reward model's server refuses to score ({refused.status})."
            ) from refused
        length = too_long(refused)
        if length is None:
            raise PromptRefusedError(
                f"The reward model's server refused a conversation ({refused.status}): {refused.said[:_SHOWN]}"
            ) from refused
        return length._replace(window=length.window or self._window)

    async def _ask(self, turns: Sequence[Message]) -> Scored:
        body = self._kind.body(self._model, turns)
        ids = body.get("input_ids")
        if ids is not None and self._window is not None and len(ids) > self._window:
            said = f"maximum context length is {self._window}, and the input ({len(ids)} tokens) is longer"
            raise Refused(400, said, "")
        scored = await self._server.post(self._kind.path, body, self._kind.read)
        return scored if ids is None else scored._replace(tokens=len(ids))

    def _watch(self, values: Sequence[float]) -> None:
        """Notice a server that was started anew with a sigmoid."""
        if self._bounded:
            return
        with self._lock:
            outside = any(not 0 <= value <= 1 for value in values)
            self._in_bounds = 0 if outside else self._in_bounds + len(values)
            turned = self._in_bounds >= IN_UNIT_INTERVAL_IN_A_ROW
        if turned:
            self.healthy = False
            raise BackendUnavailableError(f"The server of the reward model {self._model} {_SIGMOID}")


def _room(length: TooLong, characters: int) -> int:
    """How many characters of a conversation fit, by the tokens that it had."""
    if length.window is None or not length.sent:
        return characters // 2
    return int(characters * length.window / length.sent * _MARGIN)


def _parts(value: float, share: float) -> tuple[RewardPart, ...]:
    return (
        RewardPart(name="reward", value=value),
        RewardPart(name="share_read", value=share, weight=0.0),
    )
