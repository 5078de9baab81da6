"""Measures of the experiment's runs: rewards, qualities, truth of critiques, sensitivity of the reward model."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tpo.core.ports import RewardModel, Score
from tpo.core.state import Message

from demo import grammar, judge
from demo.experiment import (
    BEST_OF,
    BEST_OF_N,
    FOREIGN,
    ITERATIONS,
    REVISION,
    SAMPLE_SIZE,
    SILENT,
    TPO,
    Run,
    never,
    reward_of,
)
from demo.faults import FAULTS
from demo.grammar import Facts, Findings
from demo.judge import Estimate, estimate, share

FAULT_CASES = 200
FAULT_SEED = 99


@dataclass(frozen=True)
class Outcome:
    """Measures of the final replies of one arm, or of its first samples."""

    samples: int
    tokens: float
    reward: Estimate
    qualities: Estimate
    wrong_facts: Estimate
    invented_words: Estimate
    faultless: Estimate
    failed: int
    """Jobs without a usable answer; the other figures exclude them."""


@dataclass(frozen=True)
class Step:
    """Rewards and qualities of an arm after an iteration."""

    best: Estimate
    mean: Estimate
    qualities: Estimate


@dataclass(frozen=True)
class Truth:
    """Shares of an arm's critiques that are true, and that reach the suggestions."""

    critiques: int
    claims_true: Estimate
    claims_true_of_another: Estimate
    critiques_true: Estimate
    supported: Estimate
    carried: Estimate


@dataclass(frozen=True)
class Sensitivity:
    """Share of cases in which one fault of a kind lowers the reward, and the mean drop; the errors are over cases."""

    lowered: Estimate
    drop: Estimate


@dataclass(frozen=True)
class Results:
    """All results of one evaluation."""

    outcomes: dict[str, Outcome]
    unseen: dict[str, Outcome]
    steps: dict[str, list[Step]]
    over: dict[str, Estimate]
    truths: dict[str, Truth]
    unseen_truths: dict[str, Truth]
    faults: dict[str, Sensitivity]
    unusable: int
    updates: int
    seconds_a_job: float


Measure = Callable[[Run], float]


def by_query(runs: Sequence[Run], measure: Measure) -> list[float]:
    """Return one value per query: the mean over its seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        values[run.query].append(measure(run))
    return [fmean(values[query]) for query in sorted(values)]


def final_reward(samples: int | None = None) -> Measure:
    """Return a measure: the reward of the reply that the product would return."""
    return lambda run: reward_of(run.best(ITERATIONS, samples))


def outcome(runs: Sequence[Run], samples: int | None = None) -> Outcome:
    """Measure the final replies of an arm, or of its first `samples` samples."""
    all_runs, runs = runs, [run for run in runs if run.pool(ITERATIONS, samples)]

    def final(measure: Callable[[str, Facts], float]) -> Estimate:
        return estimate(by_query(runs, lambda run: measure(run.best(ITERATIONS, samples).text, run.facts)))

    return Outcome(
        samples=samples or SAMPLE_SIZE * (ITERATIONS + 1),
        tokens=fmean(run.written_tokens(samples) for run in runs),
        reward=estimate(by_query(runs, final_reward(samples))),
        qualities=estimate(by_query(runs, lambda run: met(run, ITERATIONS, samples))),
        wrong_facts=final(lambda text, facts: len(grammar.check(text, facts).wrong)),
        invented_words=final(lambda text, _: len(grammar.invented_words(text))),
        faultless=final(lambda text, facts: faultless(grammar.check(text, facts))),
        failed=len(all_runs) - len(runs),
    )


def faultless(found: Findings) -> bool:
    """Return True if a reply contains no fault; missing qualities are not faults."""
    return not (found.wrong or found.repeats or found.unknown)


def met(run: Run, iteration: int, samples: int | None = None) -> float:
    """Count the qualities of the best reply so far."""
    return float(len(grammar.check(run.best(iteration, samples).text, run.facts).met))


def step(runs: Sequence[Run], iteration: int) -> Step:
    """Measure an arm after an iteration: its best reply so far, and the mean over that iteration's samples only."""
    return Step(
        best=estimate(by_query(runs, lambda run: reward_of(run.best(iteration)))),
        mean=estimate(by_query(runs, lambda run: run.state.mean_reward(iteration) or 0.0)),
        qualities=estimate(by_query(runs, lambda run: met(run, iteration))),
    )


def samples_for(tokens: float, runs: Sequence[Run]) -> int:
    """Return the number of best-of-N samples that take at least `tokens` generated tokens.

    Raises ValueError if all samples take fewer.
    """
    for samples in range(1, BEST_OF + 1):
        if fmean(run.written_tokens(samples) for run in runs) >= tokens:
            return samples
    raise ValueError(f"{BEST_OF} samples take fewer than {tokens:.0f} tokens; raise BEST_OF in demo/experiment.py")


def truth(runs: Sequence[Run]) -> Truth:
    """Measure how much of an arm's critiques is true of their own replies and, for chance, of the next query's."""
    criticisms = [(run.query, criticism) for run in runs for criticism in judge.criticisms(run)]
    others = [*criticisms[ITERATIONS:], *criticisms[:ITERATIONS]]
    flags: tuple[dict[int, list[bool]], ...] = tuple(defaultdict(list) for _ in range(5))
    claims, foreign, critiques, supported, carried = flags
    for (query, criticism), (_, other) in zip(criticisms, others, strict=True):
        own = criticism.truth()
        claims[query] += own
        foreign[query] += criticism.truth(other)
        critiques[query].append(bool(own) and all(own))
        points = judge.asked_for(criticism.claims)
        supported[query] += [kind is not None and kind in points for kind in criticism.suggestions]
        carried[query] += [kind is not None and kind in criticism.suggestions for kind in points]
    return Truth(len(criticisms), *(share(list(of_query.values())) for of_query in flags))


def sensitivities(reward: RewardModel) -> dict[str, Sensitivity]:
    """Measure how each kind of single fault lowers the reward, on replies to held-out messages."""
    source = random.Random(FAULT_SEED)
    sensitivity = {}
    for kind, insert_fault in FAULTS.items():
        drops: list[float] = []
        while len(drops) < FAULT_CASES:
            facts = grammar.make_facts(source, held_out=True)
            reply = grammar.make_reply(source, facts, source.choice((0.4, 0.6, 0.8, 1.0)), rude=0.0)
            damaged = insert_fault(source, facts, reply)
            if damaged is None:
                continue
            message = Message(role="user", content=facts.query)
            request = Score(iteration=0, messages=(message,), responses=(reply.text, damaged.text))
            before, after = reward.score(request, never).values
            drops.append(before - after)
        sensitivity[kind] = Sensitivity(estimate([drop > 0 for drop in drops]), estimate(drops))
    return sensitivity


def results(
    runs: dict[str, list[Run]], unseen: dict[str, list[Run]], reward: RewardModel, seconds_a_job: float
) -> Results:
    """Compute everything that the report shows."""
    best_of = runs[BEST_OF_N]
    equal = samples_for(fmean(run.written_tokens() for run in runs[TPO]), best_of)
    rivals = {
        "best of 12": (best_of, 12),
        f"best of {equal} (as many tokens as tpo)": (best_of, equal),
        REVISION: (runs[REVISION], None),
        FOREIGN: (runs[FOREIGN], None),
        SILENT: (runs[SILENT], None),
    }
    own = by_query(runs[TPO], final_reward())
    loops = (TPO, REVISION, FOREIGN, SILENT)
    updates = [c for arm in loops for run in runs[arm] for c in run.state.candidates if c.iteration]
    return Results(
        outcomes={"best of 4": outcome(best_of, 4)}
        | {name: outcome(*rival) for name, rival in rivals.items()}
        | {TPO: outcome(runs[TPO])},
        unseen={f"best of {n}": outcome(unseen[BEST_OF_N], n) for n in (4, 12)}
        | {arm: outcome(unseen[arm]) for arm in (REVISION, TPO)},
        steps={arm: [step(runs[arm], i) for i in range(ITERATIONS + 1)] for arm in loops},
        over={name: difference(own, by_query(arm, final_reward(n))) for name, (arm, n) in rivals.items()},
        truths={arm: truth(runs[arm]) for arm in (TPO, REVISION)},
        unseen_truths={arm: truth(unseen[arm]) for arm in (TPO, REVISION)},
        faults=sensitivities(reward),
        unusable=sum(c.unusable is not None for c in updates),
        updates=len(updates),
        seconds_a_job=seconds_a_job,
    )


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of the paired differences."""
    return estimate([a - b for a, b in zip(first, second, strict=True)])
