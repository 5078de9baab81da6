"""The state of one optimization: complete, immutable, and convertible to JSON and back.

This module decides nothing (`tpo.core.loop` does), and stores nothing twice: the best candidate, the usage and the
pool are derived from the data.
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
StopReason = Literal["early_stop", "decline"]

MAX_SAMPLE_SIZE = 64
MAX_ITERATIONS = 50
MAX_BUDGET = 10**12


class Frozen(BaseModel):
    """An immutable value: changed by copy only. Unknown fields are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Frozen):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class EarlyStop(Frozen):
    """A rule that ends a run when the best reward of the pool has not risen for a while."""

    model_config = ConfigDict(strict=True)

    patience: int = Field(
        1, ge=1, le=MAX_ITERATIONS, description="number of consecutive iterations without gain after which the job ends"
    )
    min_gain: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="largest rise of the best reward that does not count as a gain"
    )


class Params(Frozen):
    """Parameters of an optimization. The defaults are the paper's (arXiv 2501.12895, section 5)."""

    mode: Mode = Field(
        "tpo", description="method: tpo, bon (best of N only) or revision (the critique sees no rejected response)"
    )
    sample_size: int = Field(5, ge=1, le=MAX_SAMPLE_SIZE, description="N: responses sampled in each step")
    max_iterations: int = Field(
        2, ge=0, le=MAX_ITERATIONS, description="D: rounds of critique and revision; 0 is best-of-N"
    )
    temperature: float = Field(0.7, ge=0, le=2, allow_inf_nan=False, description="temperature of samples and updates")
    top_p: float = Field(0.95, gt=0, le=1, allow_inf_nan=False, description="nucleus (top-p) of samples and updates")
    max_tokens: int = Field(2048, ge=1, le=131072, description="longest sample, in tokens")
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...] = Field(
        (),
        max_length=4,
        fail_fast=True,
        strict=False,
        description="strings before which a first sample ends; an update ends with its answer tag",
    )
    critique_temperature: float = Field(
        0.7, ge=0, le=2, allow_inf_nan=False, description="temperature of critiques and gradients"
    )
    critique_top_p: float = Field(
        0.99, gt=0, le=1, allow_inf_nan=False, description="nucleus (top-p) of critiques and gradients"
    )
    critique_max_tokens: int = Field(8192, ge=1, le=131072, description="longest critique or gradient, in tokens")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed from which the seed of every sample is derived")
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_BUDGET,
        description="budget of the job: tokens that the policy writes in all calls, reasoning included",
    )
    max_total_tokens: int | None = Field(
        None, ge=1, le=MAX_BUDGET, description="budget of the job: tokens that the policy reads and writes in all calls"
    )
    max_seconds: float | None = Field(
        None, gt=0, le=MAX_BUDGET, allow_inf_nan=False, description="budget of the job: seconds inside its model calls"
    )
    early_stop: EarlyStop | None = Field(
        None, description="rule that ends the job when the best reward no longer rises"
    )
    stop_on_decline: bool = Field(
        False, description="whether the job ends when an iteration's mean reward falls below the one before"
    )

    @property
    def iterations(self) -> int:
        """The number of iterations to run: none for best-of-N."""
        return 0 if self.mode == "bon" else self.max_iterations


class RewardPart(Frozen):
    """One term of a reward that is a weighted sum."""

    name: str
    value: float | None = Field(description="value before weighting; null if it was not a finite number")
    weight: float = 1.0


class Candidate(Frozen):
    """One sample in the pool. `text` is the answer, or the whole sample if it is `unusable`."""

    iteration: int
    sample: int
    text: str
    tokens: int = Field(description="generated tokens, with tags and without reasoning")
    reward: float | None = None
    unusable: Unusable | None = None
    parts: tuple[RewardPart, ...] = Field((), description="terms of the reward, if it has several")

    @property
    def id(self) -> str:
        """The candidate's name within the job: `<iteration>-<sample>`."""
        return f"{self.iteration}-{self.sample}"


class Note(Frozen):
    """A critique or a gradient: the paper's "textual loss" and "textual gradient"."""

    text: str
    attempt: int = 0
    """0, or 1 if it was requested a second time."""


class Iteration(Frozen):
    """One round: the compared candidates, the critique and the gradient. Its candidates are in `State.candidates`."""

    number: int
    chosen: str
    rejected: str | None
    critique: Note | None = None
    gradient: Note | None = None


class Call(Frozen):
    """One recorded model call."""

    number: int
    kind: CallKind
    iteration: int
    n: int
    input_tokens: int
    output_tokens: int
    seconds: float = Field(description="wall time inside the back end, queueing included")


class Usage(Frozen):
    """The usage of a job so far."""

    input_tokens: int = 0
    output_tokens: int = 0
    reward_tokens: int = 0
    model_seconds: float = Field(0.0, description="wall time inside model calls")

    @property
    def total_tokens(self) -> int:
        """Tokens that the policy read and wrote."""
        return self.input_tokens + self.output_tokens


class Decline(NamedTuple):
    """An iteration whose mean reward fell below that of the last iteration before it with scored candidates."""

    iteration: int
    mean_reward: float
    mean_reward_before: float


class State(Frozen):
    """One optimization from its input to its current step. Nothing else is needed to resume it."""

    input: tuple[Message, ...]
    params: Params
    prompts: PromptSet
    candidates: tuple[Candidate, ...] = ()
    iterations: tuple[Iteration, ...] = ()
    calls: tuple[Call, ...] = ()

    def of_iteration(self, number: int) -> Iterator[Candidate]:
        """Iterate over the candidates of one iteration; 0 is the first sampling."""
        return (c for c in self.candidates if c.iteration == number)

    def unscored(self, number: int) -> list[Candidate]:
        """Return the usable candidates of one iteration that have no reward yet."""
        return [c for c in self.of_iteration(number) if c.reward is None and c.unusable is None]

    def iteration(self, number: int) -> Iteration:
        """Return the record of an iteration; if it has not begun, with the candidates that it would compare.

        Raises NoUsableSampleError if the pool is empty.
        """
        if number <= len(self.iterations):
            return self.iterations[number - 1]
        best, worst = self.best, self.worst
        if best is None or worst is None:
            raise NoUsableSampleError()
        return Iteration(number=number, chosen=best.id, rejected=worst.id if self.params.mode == "tpo" else None)

    def candidate(self, candidate_id: str) -> Candidate:
        """Return the candidate with this id."""
        return next(c for c in self.candidates if c.id == candidate_id)

    @property
    def pool(self) -> list[Candidate]:
        """All candidates with a reward, in the order in which they entered."""
        return [c for c in self.candidates if c.reward is not None]

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest reward; of equals, the first."""
        return max(self.pool, key=_reward, default=None)

    @property
    def worst(self) -> Candidate | None:
        """The candidate with the lowest reward; of equals, the first."""
        return min(self.pool, key=_reward, default=None)

    @property
    def usage(self) -> Usage:
        """The usage summed over all calls."""
        policy = [c for c in self.calls if c.kind != "score"]
        return Usage(
            input_tokens=sum(c.input_tokens for c in policy),
            output_tokens=sum(c.output_tokens for c in policy),
            reward_tokens=sum(c.input_tokens for c in self.calls if c.kind == "score"),
            model_seconds=sum(c.seconds for c in self.calls),
        )

    def mean_reward(self, iteration: int) -> float | None:
        """Return the mean reward of the scored candidates of one iteration; None if there are none."""
        rewards = [c.reward for c in self.of_iteration(iteration) if c.reward is not None]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def declines(self) -> dict[int, Decline]:
        """Declines by the number of the iteration whose mean reward fell below that of the one before."""
        rewards: dict[int, list[float]] = {}
        for candidate in self.pool:
            rewards.setdefault(candidate.iteration, []).append(_reward(candidate))
        means = [(number, sum(values) / len(values)) for number, values in rewards.items()]
        return {n: Decline(n, mean, before) for (_, before), (n, mean) in pairwise(means) if mean < before}


def _reward(candidate: Candidate) -> float:
    return candidate.reward if candidate.reward is not None else float("-inf")
