"""Reward models behind HTTP: vLLM's `/classify` and `/pooling`, SGLang's `/classify`. The score is the raw logit.

A sigmoid turns the scores of all good responses into ties: every raw score above 17 becomes 1.0. Requests therefore
ask for raw scores, and a server whose scores all lie in [0, 1] is refused.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Self

from tpo.backends.remote.apis import Scored, ScoringApi, SglangClassify, VllmClassify, VllmPooling, load_chat
from tpo.backends.remote.connection import connect, limits_from_settings, secret
from tpo.backends.remote.context import TooLong, too_long
from tpo.backends.remote.server import Refused, Server, gather_all
from tpo.backends.spec import RewardSpec
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
"""Conversations scored once at startup: raw scores of responses this different do not all lie between 0 and 1."""

IN_UNIT_INTERVAL_IN_A_ROW = 256
"""Consecutive scores in [0, 1] after which the server is assumed to have restarted with a sigmoid."""

_SIGMOID = (
    "returns only scores between 0 and 1, so it applies a sigmoid, under which the best responses are all equal. "
    "Update it to a version that honours use_activation: false, or start vLLM with "
    "--pooler-config '{\"use_activation\": false}'. If its raw scores do lie there: TPO_REWARD_IN_UNIT_INTERVAL=true."
)
_MARGIN = 0.97
_MAX_CUTS = 24
_MAX_SHOWN = 300


class RemoteRewardModel:
    """A sequence classifier with one label behind HTTP. Thread-safe.

    Each response is sent as a separate request; the server batches the requests of all jobs.
    """

    def __init__(
        self, model: str, server: Server, kind: ScoringApi, *, bounded: bool, window: int | None = None
    ) -> None:
        self._model = model
        self._server = server
        self._api = kind
        self._in_unit_interval = bounded
        self._window = window
        self._lock = threading.Lock()
        self._consecutive_in_bounds = 0
        self.healthy = True
        """False once the server returns probabilities: the process then exits, and the next start reports why."""

    @classmethod
    def load(cls, spec: RewardSpec, settings: Settings) -> Self:
        """Wait until the server answers, and check that its scores are raw. Raises ModelRefusedError otherwise."""
        kind_name, _, model = spec.name.partition(":")
        if spec.url is None:
            raise ModelRefusedError(
                f"The reward model {spec.name} needs the address of its server. Set TPO_REWARD_URL, such as http://host:8000."
            )
        kind: ScoringApi
        match kind_name:
            case "vllm":
                kind = VllmClassify()
            case "vllm-pooling":
                kind = VllmPooling(spec.task)
            case _:
                kind = SglangClassify(load_chat(spec.tokenizer or model))
        server = Server(spec.url, secret(spec.api_key), limits_from_settings(settings))
        try:
            seconds = settings.remote_start_seconds
            window = connect(server, model, seconds, setting="its API key", path="v1/models")
            reward = cls(model, server, kind, bounded=spec.in_unit_interval, window=window)
            reward.probe()
        except BaseException:
            server.close()
            raise
        return reward

    def probe(self) -> None:
        """Score a few very different responses. Raises ModelRefusedError if the server applies a sigmoid."""
        turns = [(Message(role="user", content=q), Message(role="assistant", content=a)) for q, a in PROBES]
        try:
            work = gather_all(self._request, turns)
            values = [scored.value for scored in self._server.call(work, lambda: None)]
        except Refused as refused:
            raise ModelRefusedError(
                f"The reward model {self._model} does not score over /{self._api.path} ({refused.status}): "
                f"{refused.message[:_MAX_SHOWN]}"
            ) from refused
        except (BackendUnavailableError, BadReplyError) as error:
            raise ModelRefusedError(f"The reward model {self._model} does not score: {error}") from error
        if not self._in_unit_interval and all(0 <= value <= 1 for value in values):
            raise ModelRefusedError(f"The server of the reward model {self._model} {_SIGMOID}")

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses.

        A response that does not fit the model's window is scored by its beginning; `parts` then reports the share that
        was read.

        Raises ContextTooLongError, PromptRefusedError, BadReplyError, BackendUnavailableError, CallInterruptedError.
        """
        started = time.perf_counter()
        interrupt()
        work = gather_all(lambda response: self._score_fitting(request.messages, response), request.responses)
        try:
            scored = self._server.call(work, interrupt)
        except ModelRefusedError as error:
            self.healthy = False
            raise BackendUnavailableError(str(error)) from error
        self._watch([result.value for result, _ in scored])
        truncated = any(share < 1 for _, share in scored)
        return Rewards(
            values=tuple(result.value for result, _ in scored),
            input_tokens=sum(result.tokens for result, _ in scored),
            seconds=time.perf_counter() - started,
            parts=tuple(_parts(result.value, share) for result, share in scored) if truncated else (),
        )

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    async def _score_fitting(self, messages: Sequence[Message], response: str) -> tuple[Scored, float]:
        """Score the part of a response that fits the window; also return the share of the response that was read.

        Raises ContextTooLongError if not even the beginning of the response fits.
        """
        before = sum(len(m.content) for m in messages)
        kept = response
        unknown_length: TooLong | None = None
        for _ in range(_MAX_CUTS):
            try:
                scored = await self._request((*messages, Message(role="assistant", content=kept)))
            except Refused as refused:
                length = self._refused_length(refused)
                unknown_length = None if length.sent else length
                fitting = _fitting_characters(length, before + len(kept)) - before if length.sent else len(kept) // 2
                kept = kept[: min(fitting, len(kept) - 1)] if fitting > 0 else ""
                if not kept:
                    break
            else:
                # The response was halved because the server did not report its length. The token count of the score
                # tells how many more characters fit.
                more = 0
                if unknown_length:
                    measured = unknown_length._replace(sent=scored.tokens)
                    more = _fitting_characters(measured, before + len(kept)) - before
                if more > len(kept):
                    with contextlib.suppress(Refused):
                        longer = response[:more]
                        scored = await self._request((*messages, Message(role="assistant", content=longer)))
                        kept = longer
                return scored, len(kept) / len(response) if response else 1.0
        raise ContextTooLongError(
            f"The conversation leaves no room for a response in the window of the reward model"
            f"{f' ({length.window} tokens)' if length.window else ''}. Shorten the conversation, or use a reward model "
            "with a larger window."
        )

    def _refused_length(self, refused: Refused) -> TooLong:
        """Return the lengths in a refusal for length.

        Raises BackendUnavailableError or PromptRefusedError if the request was refused for another reason.
        """
        if refused.status < 400 or refused.status in (401, 403, 404, 429):
            raise BackendUnavailableError(
                f"The reward model's server refuses to score ({refused.status})."
            ) from refused
        length = too_long(refused)
        if length is None:
            raise PromptRefusedError(
                f"The reward model's server refused a conversation ({refused.status}): {refused.message[:_MAX_SHOWN]}"
            ) from refused
        return length._replace(window=length.window or self._window)

    async def _request(self, turns: Sequence[Message]) -> Scored:
        body = self._api.body(self._model, turns)
        ids = body.get("input_ids")
        if ids is not None and self._window is not None and len(ids) > self._window:
            message = f"maximum context length is {self._window}, and the input ({len(ids)} tokens) is longer"
            raise Refused(400, message, "")
        scored = await self._server.post(self._api.path, body, self._api.read)
        return scored if ids is None else scored._replace(tokens=len(ids))

    def _watch(self, values: Sequence[float]) -> None:
        """Detect a server that was restarted with a sigmoid. Raises BackendUnavailableError if it was."""
        if self._in_unit_interval:
            return
        with self._lock:
            outside = any(not 0 <= value <= 1 for value in values)
            self._consecutive_in_bounds = 0 if outside else self._consecutive_in_bounds + len(values)
            has_sigmoid = self._consecutive_in_bounds >= IN_UNIT_INTERVAL_IN_A_ROW
        if has_sigmoid:
            self.healthy = False
            raise BackendUnavailableError(f"The server of the reward model {self._model} {_SIGMOID}")


def _fitting_characters(length: TooLong, characters: int) -> int:
    """Estimate how many characters of a conversation fit, from the number of tokens that it had."""
    if length.window is None or not length.sent:
        return characters // 2
    return int(characters * length.window / length.sent * _MARGIN)


def _parts(value: float, share: float) -> tuple[RewardPart, ...]:
    """Report a score together with the share of the response that was read."""
    return (
        RewardPart(name="reward", value=value),
        RewardPart(name="share_read", value=share, weight=0.0),
    )
