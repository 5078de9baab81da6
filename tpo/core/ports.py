"""The core's ports: two protocols with one method each, and the values that cross them."""

from collections.abc import Callable, Iterable
from typing import Protocol

from tpo.core.errors import BadReplyError
from tpo.core.state import FinishReason, Frozen, Message, PolicyCall, RewardPart

Interrupt = Callable[[], None]
"""Called by a back end between two tokens, or as often as it can. It raises `CallInterruptedError` to stop the call."""


class Generate(Frozen):
    """A request to the policy: one sample for each seed."""

    kind: PolicyCall
    iteration: int
    first_sample: int
    """The number of the first sample within its iteration."""
    messages: tuple[Message, ...]
    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    """A sample ends before the first of these strings; its reasoning may contain them."""

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.seeds)


def cut_at(text: str, stop: Iterable[str]) -> str:
    """Return the text before the first of these strings; all of it if it contains none."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


class Score(Frozen):
    """A request to the reward model: one number for each response to the same conversation."""

    iteration: int
    messages: tuple[Message, ...]
    responses: tuple[str, ...]


class Text(Frozen):
    """One sample. Reasoning of a thinking model is neither in `text` nor in `tokens`."""

    text: str
    finish_reason: FinishReason
    tokens: int


class Generation(Frozen):
    """The policy's reply: as many samples as seeds, in the same order."""

    texts: tuple[Text, ...]
    input_tokens: int
    seconds: float
    reasoning_tokens: int = 0


class Rewards(Frozen):
    """The reward model's reply: one raw score for each response, in the same order, NaN and infinities included.

    If scores are weighted sums, `parts` has the parts of each response's score; otherwise it is empty.
    """

    values: tuple[float, ...]
    input_tokens: int
    seconds: float
    parts: tuple[tuple[RewardPart, ...], ...] = ()

    def check_count(self, source: str, expected: int) -> None:
        """Check that there is one score for each response. `source` names what scored. Raises BadReplyError."""
        if len(self.values) != expected:
            raise BadReplyError(f"{source} returned {len(self.values)} scores for {expected} responses.")


Request = Generate | Score
Reply = Generation | Rewards


class Policy(Protocol):
    """A frozen language model."""

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Sample one response for each seed.

        Raises ContextTooLongError, BadReplyError, BackendUnavailableError, CallInterruptedError.
        """
        ...


class RewardModel(Protocol):
    """A frozen reward model."""

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Score responses. Raises ContextTooLongError, BadReplyError, BackendUnavailableError, CallInterruptedError."""
        ...
