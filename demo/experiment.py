"""Run the product's own loop on the demo models, with many messages in lockstep, and keep the final states.

Lockstep makes a control experiment possible: each state can receive the suggestions that were written for another.
"""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tpo.core.errors import NoUsableSampleError
from tpo.core.loop import apply, pending
from tpo.core.ports import Generate, Generation, Policy, RewardModel, Rewards, Score
from tpo.core.prompts import load
from tpo.core.state import Candidate, Message, Mode, Params, State

from demo import grammar
from demo.grammar import Facts

QUERIES = 60
SEEDS = (0, 1, 2)
SAMPLE_SIZE = 4
ITERATIONS = 2
BEST_OF = 32
"""Samples of the best-of-N arm; a smaller N uses the first of them."""

BEST_OF_UNSEEN = 12
MAX_TOKENS = 200
HELD_OUT_SEED = 4242
UNSEEN_SEED = 2424

TPO, REVISION, BEST_OF_N = "tpo", "revision", "best of N"
FOREIGN, SILENT = "tpo, suggestions of another query", "tpo, no suggestion"
ARMS: dict[str, Mode] = {TPO: "tpo", REVISION: "revision", FOREIGN: "tpo", SILENT: "tpo", BEST_OF_N: "bon"}
UNSEEN_ARMS = (TPO, REVISION, BEST_OF_N)
"""Arms that the second held-out set is run through."""


@dataclass(frozen=True)
class Run:
    """A finished optimization of one held-out message."""

    query: int
    seed: int
    facts: Facts
    state: State

    def pool(self, iteration: int, samples: int | None = None) -> list[Candidate]:
        """Return the scored candidates up to an iteration, or among the first samples; none if the job failed."""
        return [c for c in self.state.pool if c.iteration <= iteration and (samples is None or c.sample < samples)]

    def best(self, iteration: int, samples: int | None = None) -> Candidate:
        """Return the best candidate of that pool. Raises ValueError if the pool is empty."""
        return max(self.pool(iteration, samples), key=reward_of)

    def written_tokens(self, samples: int | None = None) -> int:
        """Count the generated tokens of the whole run, or of the first `samples` samples."""
        if samples is None:
            return self.state.usage.output_tokens
        return sum(c.tokens for c in self.state.candidates if c.sample < samples)


def reward_of(candidate: Candidate) -> float:
    """Return the reward of a candidate of the pool. Raises ValueError if it has none."""
    if candidate.reward is None:
        raise ValueError(f"candidate {candidate.id} has no reward")
    return candidate.reward


def held_out_facts(count: int = QUERIES) -> list[Facts]:
    """Make messages whose pair of name and item does not occur in training."""
    source = random.Random(HELD_OUT_SEED)
    return [grammar.make_facts(source, held_out=True) for _ in range(count)]


def unseen_facts(count: int = QUERIES) -> list[Facts]:
    """Make messages whose words and phrasings do not occur in training."""
    source = random.Random(UNSEEN_SEED)
    return [grammar.make_unseen_facts(source) for _ in range(count)]


class Models:
    """Serves many requests concurrently; the engine behind the policy batches them."""

    def __init__(self, policy: Policy, reward: RewardModel) -> None:
        self._policy = policy
        self._reward = reward
        self._threads = ThreadPoolExecutor(max_workers=QUERIES)

    def answer(self, requests: Sequence[Generate | Score]) -> list[Generation | Rewards]:
        """Return the results of the requests, in their order."""
        return list(self._threads.map(self._answer, requests))

    def _answer(self, request: Generate | Score) -> Generation | Rewards:
        if isinstance(request, Generate):
            return self._policy.generate(request, never)
        return self._reward.score(request, never)


def never() -> None:
    """Never interrupt: an `Interrupt` that raises nothing."""


def run_arm(models: Models, arm: str, facts: Sequence[Facts], seed: int, best_of: int = BEST_OF) -> list[Run]:
    """Run every message to its end in one arm of the experiment."""
    states = [start(arm, message, seed * QUERIES + i, best_of) for i, message in enumerate(facts)]
    while requests := {i: request for i, state in enumerate(states) if (request := next_request(state))}:
        results = models.answer(list(requests.values()))
        if arm == FOREIGN:
            results = exchange_gradients(list(requests.values()), results)
        if arm == SILENT:
            results = silence_gradients(list(requests.values()), results)
        for i, result in zip(requests, results, strict=True):
            states[i] = apply(states[i], requests[i], result)
    return [Run(i, seed, message, state) for i, (message, state) in enumerate(zip(facts, states, strict=True))]


def next_request(state: State) -> Generate | Score | None:
    """Return the next call of an optimization; None if it has ended, or failed without a usable first answer."""
    try:
        return pending(state)
    except NoUsableSampleError:
        return None


def start(arm: str, facts: Facts, seed: int, best_of: int = BEST_OF) -> State:
    """Return the state of an optimization before its first call."""
    params = Params(
        mode=ARMS[arm],
        sample_size=best_of if arm == BEST_OF_N else SAMPLE_SIZE,
        max_iterations=ITERATIONS,
        max_tokens=MAX_TOKENS,
        critique_max_tokens=MAX_TOKENS,
        seed=seed,
    )
    return State(input=(Message(role="user", content=facts.query),), params=params, prompts=load("tiny"))


def exchange_gradients(
    requests: Sequence[Generate | Score], results: Sequence[Generation | Rewards]
) -> list[Generation | Rewards]:
    """Return the results with every textual gradient moved to the next query."""
    places = [i for i, request in enumerate(requests) if isinstance(request, Generate) and request.kind == "gradient"]
    exchanged = list(results)
    for place, following in zip(places, [*places[1:], *places[:1]], strict=True):
        exchanged[following] = results[place]
    return exchanged


def silence_gradients(
    requests: Sequence[Generate | Score], results: Sequence[Generation | Rewards]
) -> list[Generation | Rewards]:
    """Return the results with every textual gradient replaced by the training text that asks for no change."""
    return [
        result.model_copy(
            update={"texts": tuple(t.model_copy(update={"text": grammar.NO_CHANGE}) for t in result.texts)}
        )
        if isinstance(request, Generate) and request.kind == "gradient" and isinstance(result, Generation)
        else result
        for request, result in zip(requests, results, strict=True)
    ]
