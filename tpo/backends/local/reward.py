"""The reward model on this machine: messages and responses to tokens, the engine that scores them.

A response that is longer than the model's window is scored by its beginning: as many of its tokens as fit, and the
tokens that close its turn. Its parts then say how much was read, as those of a remote reward model do.
"""

import time
from collections.abc import Sequence
from typing import Self

from tpo.backends.futures import result_of
from tpo.backends.local.loader import Model, load_reward_network
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
        """Load the weights and start the thread. Raises ModelRefusedError."""
        return cls(load_reward_network(spec, settings))

    @property
    def healthy(self) -> bool:
        """False when the engine's thread has ended, or is stuck."""
        return self._engine.healthy

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses.

        Raises ContextTooLongError, PromptRefusedError, BackendUnavailableError, and what `interrupt` raises.

        Only a conversation that leaves no room for any response is too long.
        """
        started = time.perf_counter()
        interrupt()
        whole = [self._conversation(request, response) for response in request.responses]
        conversations = [self._fitted(request, tokens) for tokens in whole]
        scores = result_of(self._engine.submit(conversations), interrupt)
        return Rewards(
            values=scores,
            input_tokens=sum(len(c) for c in conversations),
            seconds=time.perf_counter() - started,
            parts=self._parts(request, scores, whole),
        )

    def close(self) -> None:
        """Stop the thread after the batch that runs."""
        self._engine.close()

    def _parts(
        self, request: Score, scores: Sequence[float], whole: Sequence[Sequence[int]]
    ) -> tuple[tuple[RewardPart, ...], ...]:
        """How much of each response was read; empty where all of all was."""
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
                f"The tokenizer gave token {max(tokens)}, and the reward model knows only {self._model.vocabulary}."
            )
        return tokens

    def _fitted(self, request: Score, tokens: list[int]) -> list[int]:
        """As much of the response as the window holds, and the end of its turn."""
        window = self._model.context
        if len(tokens) <= window:
            return tokens
        bare = self._conversation(request, "")
        closing = _common(tokens[::-1], bare[::-1])
        if len(bare) >= window:
            raise ContextTooLongError(
                f"A conversation without any response has {len(bare)} tokens; the reward model reads at most {window}. "
                "Shorten the conversation, or take a reward model that reads more."
            )
        return tokens[: window - closing] + tokens[len(tokens) - closing :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
