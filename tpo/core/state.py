"""The value that travels: one optimization, whole, frozen, to JSON and back.

Nothing here decides anything (`tpo.core.loop` does), and nothing is stored twice: the best candidate, the usage and
the pool are derived from the data.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tpo.core.errors import NoUsableSampleError
from tpo.core.prompts import PromptSet

Mode = Literal["tpo", "revision", "bon"]
PolicyCall = Literal["sample", "critique", "gradient", "update"]
CallKind = Literal[PolicyCall, "score"]
FinishReason = Literal["stop", "length"]
Unusable = Literal["empty", "cut_off", "no_answer_tags", "reward_not_finite"]
Budget = Literal["max_output_tokens", "max_total_tokens", "max_seconds"]
GivenUp = Literal["early_stop", "decline"]

MAX_SAMPLE_SIZE = 64
MAX_ITERATIONS = 50
MAX_BUDGET = 10**12


class Frozen(BaseModel):
    """A value: never changed, only copied; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class EarlyStop(Frozen):
    """When further iterations are given up: the best reward of the whole pool has not risen for a while."""

    model_config = ConfigDict(strict=True)

    patience: int = Field(1, ge=1, le=MAX_ITERATIONS, description="iterations in a row that may bring no gain")
    min_gain: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="a rise of the best reward by no more than this is none"
    )


class Params(Frozen):
    """How to optimize. The defaults are the paper's (arXiv 2501.12895, section 5)."""

    mode: Mode = "tpo"
    sample_size: int = Field(5, ge=1, le=MAX_SAMPLE_SIZE, description="N: responses sampled in each step")
    max_iterations: int = Field(
        2, ge=0, le=MAX_ITERATIONS, description="D: rounds of critique and revision; 0 is best-of-N"
    )
    temperature: float = Field(0.7, ge=0, le=2, allow_inf_nan=False, description="of samples and updates")
    top_p: float = Field(0.95, gt=0, le=1, allow_inf_nan=False, description="of samples and updates")
    max_tokens: int = Field(2048, ge=1, le=131072, description="longest sampled response, in tokens")
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...] = Field(
        (),
        max_length=4,
        strict=False,
        description="a first sample ends before the first of these strings; a revision ends with its answer tag",
    )
    critique_temperature: float = Field(
        0.7, ge=0, le=2, allow_inf_nan=False, description="of textual loss and gradient"
    )
    critique_top_p: float = Field(0.99, gt=0, le=1, allow_inf_nan=False, description="of textual loss and gradient")
    critique_max_tokens: int = Field(8192, ge=1, le=131072, description="longest textual loss or gradient, in tokens")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="every request's own seed is derived from it")
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_BUDGET,
        description="budget of the job: what the policy writes in all calls, reasoning too",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, le=MAX_BUDGET, description="budget of the job: what the policy reads and writes in all calls"
    )
    max_seconds: float | None = Field(
        None, gt=0, le=MAX_BUDGET, allow_inf_nan=False, description="budget of the job: seconds inside its model calls"
    )
    early_stop: EarlyStop | None = Field(None, description="end when the best reward no longer rises")
    stop_on_decline: bool = Field(False, description="end when an iteration's mean reward falls below the one before")

    @property
    def iterations(self) -> int:
        """D as it is run: best-of-N has no iterations."""
        return 0 if self.mode == "bon" else self.max_iterations


class RewardPart(Frozen):
    """One of the things that a reward is the weighted sum of."""

    name: str
    value: float | None = Field(description="before its weight; null where it was not a finite number")
    weight: float = 1.0


class Candidate(Frozen):
    """One sampled response. `text` is the answer; where there is none, the raw reply, and `unusable` says why."""

    iteration: int
    sample: int
    text: str
    tokens: int = Field(description="generated for it, tags counted, reasoning not")
    reward: float | None = None
    unusable: Unusable | None = None
    parts: tuple[RewardPart, ...] = Field((), description="what the reward is the sum of, where it has several parts")

    @property
    def id(self) -> str:
        """Its name within the job: `<iteration>-<sample>`."""
        return f"{self.iteration}-{self.sample}"


class Note(Frozen):
    """What the policy wrote about a candidate: a textual loss or a textual gradient."""

    text: str
    attempt: int = 0


class Iteration(Frozen):
    """One round: whom it compared and what was said. Its candidates stand in `State.candidates`."""

    number: int
    chosen: str
    rejected: str | None
    critique: Note | None = None
    gradient: Note | None = None


class Call(Frozen):
    """One model call that was made and recorded."""

    number: int
    kind: CallKind
    iteration: int
    n: int
    input_tokens: int
    output_tokens: int
    seconds: float = Field(description="wall time inside the back end, waiting included")


class Usage(Frozen):
    """What a job has used so far."""

    input_tokens: int = 0
    output_tokens: int = 0
    reward_tokens: int = 0
    model_seconds: float = Field(0.0, description="wall time inside its model calls, whatever they run on")

    @property
    def total_tokens(self) -> int:
        """What the policy read and wrote."""
        return self.input_tokens + self.output_tokens


class Decline(NamedTuple):
    """An iteration whose mean reward fell below that of the last one before it that has any."""

    iteration: int
    mean_reward: float
    mean_reward_before: float


class State(Frozen):
    """One optimization from its input to where it stands now. Resuming is going on from this value alone."""

    input: tuple[Message, ...]
    params: Params
    prompts: PromptSet
    candidates: tuple[Candidate, ...] = ()
    iterations: tuple[Iteration, ...] = ()
    calls: tuple[Call, ...] = ()

    def of_iteration(self, number: int) -> Iterator[Candidate]:
        """The candidates of one iteration; 0 is the first sampling."""
        return (c for c in self.candidates if c.iteration == number)

    def unscored(self, number: int) -> list[Candidate]:
        """Return the usable candidates of one iteration that have no reward yet."""
        return [c for c in self.of_iteration(number) if c.reward is None and c.unusable is None]

    def iteration(self, number: int) -> Iteration:
        """Return the record of an iteration that has begun, or whom the next one would compare.

        Raises NoUsableSampleError when the pool is empty.
        """
        if number <= len(self.iterations):
            return self.iterations[number - 1]
        best, worst = self.best, self.worst
        if best is None or worst is None:
            raise NoUsableSampleError()
        return Iteration(number=number, chosen=best.id, rejected=worst.id if self.params.mode == "tpo" else None)

    def candidate(self, candidate_id: str) -> Candidate:
        """The candidate with this id."""
        return next(c for c in self.candidates if c.id == candidate_id)

    @property
    def pool(self) -> list[Candidate]:
        """Every candidate that has a reward, in the order in which they entered."""
        return [c for c in self.candidates if c.reward is not None]

    @property
    def best(self) -> Candidate | None:
        """The candidate of the highest reward; of equals, the first."""
        return max(self.pool, key=_reward, default=None)

    @property
    def worst(self) -> Candidate | None:
        """The candidate of the lowest reward; of equals, the first."""
        return min(self.pool, key=_reward, default=None)

    @property
    def usage(self) -> Usage:
        """The sum over all calls."""
        policy = [c for c in self.calls if c.kind != "score"]
        return Usage(
            input_tokens=sum(c.input_tokens for c in policy),
            output_tokens=sum(c.output_tokens for c in policy),
            reward_tokens=sum(c.input_tokens for c in self.calls if c.kind == "score"),
            model_seconds=sum(c.seconds for c in self.calls),
        )

    def mean_reward(self, iteration: int) -> float | None:
        """The mean reward of all scored candidates of one iteration: the honest curve beside the best so far."""
        rewards = [c.reward for c in self.of_iteration(iteration) if c.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def declines(self) -> dict[int, Decline]:
        """The iterations whose mean reward fell below that of the one before: there the policy made it worse."""
        rewards: dict[int, list[float]] = {}
        for candidate in self.pool:
            rewards.setdefault(candidate.iteration, []).append(_reward(candidate))
        means = [(number, sum(values) / len(values)) for number, values in rewards.items()]
        return {n: Decline(n, mean, before) for (_, before), (n, mean) in pairwise(means) if mean < before}


def _reward(candidate: Candidate) -> float:
    return candidate.reward if candidate.reward is not None else float("-inf")
