"""Reward model on this machine: encodes conversations and scores them with the reward engine.

A response that does not fit the model's window is scored by its beginning: as many of its tokens as fit, followed by
the tokens that close its turn. `parts` then reports the share that was read, as for a remote reward model.
"""

import time
from collections.abc import Sequence
from typing import Self

from tpo.backends.futures import result_of
from tpo.backends.local.loader import Model, load_reward_classifier
from tpo.backends.local.reward_engine import RewardEngine
from tpo.core.errors import ContextTooLongError, PromptRefusedError
from tpo.core.ports import Interrupt, Rewards, Score
from tpo.core.state import Message, RewardPart
from tpo.settings import Settings


class LocalRewardModel:
    """A sequence classifier with one label. The score is its raw logit."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._engine = RewardEngine(model.network, model.vocabulary)

    @classmethod
    def load(cls, spec: str, settings: Settings) -> Self:
        """Load the weights and start the engine's thread. Raises ModelRefusedError if the model cannot be loaded."""
        return cls(load_reward_classifier(spec, settings))

    @property
    def healthy(self) -> bool:
        """False when the engine cannot serve further requests."""
        return self._engine.healthy

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses.

        A conversation is too long only if it does not fit the window without any response.

        Raises ContextTooLongError, PromptRefusedError, BackendUnavailableError, and what `interrupt` raises.
        """
        started = time.perf_counter()
        interrupt()
        whole = [self._conversation(request, response) for response in request.responses]
        conversations = [self._fit(request, tokens) for tokens in whole]
        scores = result_of(self._engine.submit(conversations), interrupt)
        return Rewards(
            values=scores,
            input_tokens=sum(len(c) for c in conversations),
            seconds=time.perf_counter() - started,
            parts=self._parts(request, scores, whole),
        )

    def close(self) -> None:
        """Stop the engine's thread after the current batch."""
        self._engine.close()

    def _parts(
        self, request: Score, scores: Sequence[float], whole: Sequence[Sequence[int]]
    ) -> tuple[tuple[RewardPart, ...], ...]:
        """Return the share of each response that was read; empty if all were read completely."""
        window = self._model.context
        if all(len(tokens) <= window for tokens in whole):
            return ()
        bare = len(self._conversation(request, ""))
        shares = [1.0 if len(tokens) <= window else (window - bare) / (len(tokens) - bare) for tokens in whole]
        return tuple(
            (RewardPart(name="reward", value=score), RewardPart(name="share_read", value=share, weight=0.0))
            for score, share in zip(scores, shares, strict=True)
        )

    def _conversation(self, request: Score, response: str) -> list[int]:
        turns = (*request.messages, Message(role="assistant", content=response))
        tokens = self._model.chat.encode(turns, for_reply=False)
        if max(tokens) >= self._model.vocabulary:
            raise PromptRefusedError(
                f"The tokenizer produced token {max(tokens)}, but the reward model knows only {self._model.vocabulary} "
                "tokens. Use the tokenizer that belongs to the model."
            )
        return tokens

    def _fit(self, request: Score, tokens: list[int]) -> list[int]:
        """Cut the response to the window, and keep the tokens that end its turn.

        Raises ContextTooLongError if the conversation leaves no space for a response.
        """
        window = self._model.context
        if len(tokens) <= window:
            return tokens
        bare = self._conversation(request, "")
        closing = _common_prefix_length(tokens[::-1], bare[::-1])
        if len(bare) >= window:
            raise ContextTooLongError(
                f"A conversation without any response has {len(bare)} tokens; the reward model reads at most {window}. "
                "Shorten the conversation, or use a reward model with a larger window."
            )
        return tokens[: window - closing] + tokens[len(tokens) - closing :]


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
