"""Reward files, a fake judge and a fake reward model for the tests of combined rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.fakes import sample_text
from tpo.backends import load_reward
from tpo.core.ports import Generate, Generation, Interrupt, Rewards, Score, Text
from tpo.core.state import Message, RewardPart
from tpo.settings import Settings


def load_reward_file(folder: Path, text: str, policy: Any = None, **settings: Any) -> Any:
    """Write the reward file into the folder and load the reward that it describes."""
    file = folder / "reward.toml"
    file.write_text(text)
    return load_reward(Settings(reward_model="quality", reward_file=file, **settings), policy)


def score_request(*responses: str) -> Score:
    """Return a request to score these texts as answers to one question."""
    return Score(iteration=0, messages=(Message(role="user", content="Hello {query}?"),), responses=responses)


class FakeJudge:
    """A judge whose judgements are a function of the request and the sample's number."""

    def __init__(self, judgement: Callable[[Generate, int], str]) -> None:
        self._judgement = judgement
        self.requests: list[Generate] = []

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Return one judgement for each sample, and record the request."""
        interrupt()
        self.requests.append(request)
        texts: tuple[Text, ...] = tuple(sample_text(self._judgement(request, i)) for i in range(request.n))
        return Generation(texts=texts, input_tokens=10, seconds=0.1, reasoning_tokens=5)


class FixedReward:
    """A reward model that returns the same rewards for every request."""

    def __init__(self, *values: float, parts: tuple[tuple[RewardPart, ...], ...] = ()) -> None:
        self.rewards = Rewards(values=values, input_tokens=1, seconds=0.0, parts=parts)
        self.closed = False
        self.healthy = True

    def score(self, _request: Score, _interrupt: Interrupt) -> Rewards:
        """Return the fixed rewards."""
        return self.rewards

    def close(self) -> None:
        """Record that the model was closed."""
        self.closed = True
