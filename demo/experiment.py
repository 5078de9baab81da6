"""Runs the product's own loop on the demo models, many messages in lock-step, and keeps the final states.

Lock-step is what makes a control possible: each state can be given the suggestions that were written for another.
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
"""Samples of the best-of-N arm; a smaller N looks at the first of them."""

BEST_OF_UNSEEN = 12
MAX_TOKENS = 200
HELD_OUT_SEED = 4242
UNSEEN_SEED = 2424

TPO, REVISION, BEST_OF_N = "tpo", "revision", "best of N"
FOREIGN, SILENT = "tpo, suggestions of another query", "tpo, no suggestion"
ARMS: dict[str, Mode] = {TPO: "tpo", REVISION: "revision", FOREIGN: "tpo", SILENT: "tpo", BEST_OF_N: "bon"}
UNSEEN_ARMS = (TPO, REVISION, BEST_OF_N)
"""What the second held-out set goes through."""


@dataclass(frozen=True)
class Run:
    """One finished optimization of one held-out message."""

    query: int
    seed: int
    facts: Facts
    state: State

    def pool(self, iteration: int, samples: int | None = None) -> list[Candidate]:
        """The scored candidates up to an iteration, or among the first so many samples; none where the job failed."""
        return [c for c in self.state.pool if c.iteration <= iteration and (samples is None or c.sample < samples)]

    def best(self, iteration: int, samples: int | None = None) -> Candidate:
        """The best of that pool. Raises ValueError where it is empty."""
        return max(self.pool(iteration, samples), key=reward_of)

    def written_tokens(self, samples: int | None = None) -> int:
        """Tokens generated in all, or for the first so many samples."""
        if samples is None:
            return self.state.usage.output_tokens
        return sum(c.tokens for c in self.state.candidates if c.sample < samples)


def reward_of(candidate: Candidate) -> float:
    """The reward of a candidate of the pool."""
    if candidate.reward is None:
        raise ValueError(f"candidate {candidate.id} has no reward")
    return candidate.reward


def held_out_facts(count: int = QUERIES) -> list[Facts]:
    """Messages whose pair of name and item no message of training had."""
    source = random.Random(HELD_OUT_SEED)
    return [grammar.make_facts(source, held_out=True) for _ in range(count)]


def unseen_facts(count: int = QUERIES) -> list[Facts]:
    """Messages whose words and wordings training never showed."""
    source = random.Random(UNSEEN_SEED)
    return [grammar.make_unseen_facts(source) for _ in range(count)]


class Models:
    """Answers many requests at once; the engine behind the policy batches them."""

    def __init__(self, policy: Policy, reward: RewardModel) -> None:
        self._policy = policy
        self._reward = reward
        self._threads = ThreadPoolExecutor(max_workers=QUERIES)

    def answer(self, requests: Sequence[Generate | Score]) -> list[Generation | Rewards]:
        """The replies to the requests, in their order."""
        return list(self._threads.map(self._answer, requests))

    def _answer(self, request: Generate | Score) -> Generation | Rewards:
        if isinstance(request, Generate):
            return self._policy.generate(request, never)
        return self._reward.score(request, never)


def never() -> None:
    """An interrupt that never comes."""


def run_arm(models: Models, arm: str, facts: Sequence[Facts], seed: int, best_of: int = BEST_OF) -> list[Run]:
    """Every message through one arm of the experiment, to its end."""
    states = [start(arm, message, seed * QUERIES + i, best_of) for i, message in enumerate(facts)]
    while waiting := {i: request for i, state in enumerate(states) if (request := asked(state))}:
        replies = models.answer(list(waiting.values()))
        if arm == FOREIGN:
            replies = exchange_gradients(list(waiting.values()), replies)
        if arm == SILENT:
            replies = silence_gradients(list(waiting.values()), replies)
        for i, reply in zip(waiting, replies, strict=True):
            states[i] = apply(states[i], waiting[i], reply)
    return [Run(i, seed, message, state) for i, (message, state) in enumerate(zip(facts, states, strict=True))]


def asked(state: State) -> Generate | Score | None:
    """The next call of an optimization; None where it has ended, or failed because no first answer can be used."""
    try:
        return pending(state)
    except NoUsableSampleError:
        return None


def start(arm: str, facts: Facts, seed: int, best_of: int = BEST_OF) -> State:
    """The state of one optimization before its first call."""
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
    requests: Sequence[Generate | Score], replies: Sequence[Generation | Rewards]
) -> list[Generation | Rewards]:
    """The replies with every textual gradient handed on to the next query."""
    places = [i for i, request in enumerate(requests) if isinstance(request, Generate) and request.kind == "gradient"]
    exchanged = list(replies)
    for place, following in zip(places, [*places[1:], *places[:1]], strict=True):
        exchanged[following] = replies[place]
    return exchanged


def silence_gradients(
    requests: Sequence[Generate | Score], replies: Sequence[Generation | Rewards]
) -> list[Generation | Rewards]:
    """The replies with every textual gradient replaced by the one of training that asks for nothing."""
    return [
        reply.model_copy(update={"texts": tuple(t.model_copy(update={"text": grammar.NO_CHANGE}) for t in reply.texts)})
        if isinstance(request, Generate) and request.kind == "gradient" and isinstance(reply, Generation)
        else reply
        for request, reply in zip(requests, replies, strict=True)
    ]
