"""Measures of the demo models: errors over queries, equal tokens, and acceptance bars that can fail."""

import re
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from demo import experiment, judge, measures, report
from demo.experiment import FOREIGN, REVISION, SILENT, TPO, Run
from demo.judge import Estimate
from demo.measures import Outcome, Results, Sensitivity, Step, Truth
from demo.settings import FOLDER
from tpo.core.state import Candidate

GOOD, NONE = Estimate(1.0, 0.0), Estimate(0.0, 0.0)


def make_run(query: int, tokens: tuple[int, ...] = ()) -> Run:
    """Return a run whose candidates have these numbers of tokens."""
    (facts,) = experiment.held_out_facts(1)
    state = experiment.start(experiment.BEST_OF_N, facts, seed=0)
    candidates = tuple(
        Candidate(iteration=0, sample=i, text="There is no charge.", tokens=count, reward=1.0)
        for i, count in enumerate(tokens)
    )
    return Run(query, 0, facts, state.model_copy(update={"candidates": candidates}))


def test_by_query_averages_seeds_before_error() -> None:
    runs = [make_run(query) for _ in range(3) for query in range(4)]
    values = iter((1.0, 2.0, 3.0, 4.0) * 3)
    found = judge.estimate(measures.by_query(runs, lambda run: next(values)))
    assert found == Estimate(2.5, stdev((1, 2, 3, 4)) / 2)


def test_share_takes_error_over_queries() -> None:
    together = judge.share([[True] * 4, [True] * 4, [False] * 4, [False] * 4])
    assert together == judge.estimate([1, 1, 0, 0])
    assert judge.share([[True, False] * 2] * 4) == Estimate(0.5, 0.0)
    assert judge.share([[True] * 9, [False]]).mean == 0.9
    assert isnan(judge.share([[], []]).mean)


def test_samples_for_rounds_up_to_equal_tokens() -> None:
    runs = [make_run(0, (10, 20) * (experiment.BEST_OF // 2))]
    assert measures.samples_for(10, runs) == 1
    assert measures.samples_for(11, runs) == 2
    every = runs[0].written_tokens(experiment.BEST_OF)
    assert measures.samples_for(every, runs) == experiment.BEST_OF
    with pytest.raises(ValueError, match="raise BEST_OF"):
        measures.samples_for(every + 1, runs)


def test_critique_without_claim_does_not_hold() -> None:
    (facts,) = experiment.held_out_facts(1)
    claims = judge.read_critique("Greet Omar. The chosen reply lacks a reason. Say", facts)
    assert [claim.holds("There is no charge.", None, facts) for claim in claims] == [True, False]
    assert judge.asked_for(claims) == ["reason"]
    (empty,) = judge.read_critique("Greet Omar.", facts)
    assert not empty.holds("", None, facts)


def all_good() -> Results:
    """Return results that just meet every bar."""
    final = Outcome(12, 700.0, GOOD, GOOD, Estimate(0.029, 0.0), NONE, GOOD, 0)
    truth = Truth(
        critiques=360,
        claims_true=Estimate(0.95, 0.0),
        claims_true_of_another=NONE,
        critiques_true=Estimate(0.8, 0.0),
        supported=Estimate(0.9, 0.0),
        carried=Estimate(0.9, 0.0),
    )
    return Results(
        outcomes={TPO: final},
        unseen={},
        steps={TPO: [Step(Estimate(i, 0.0), Estimate(i, 0.0), GOOD) for i in range(3)]},
        over={
            "best of 12": Estimate(2.0, 0.0),
            "best of 24 (as many tokens as tpo)": Estimate(1.5, 0.0),
            REVISION: NONE,
            FOREIGN: Estimate(1.0, 0.0),
            SILENT: Estimate(1.01, 0.0),
        },
        truths={TPO: truth},
        unseen_truths={},
        faults={"cut": Sensitivity(Estimate(0.9, 0.0), GOOD), "repeat": Sensitivity(GOOD, GOOD)},
        unusable=0,
        updates=1440,
        seconds_a_job=2.9,
    )


def test_bars_hold_when_just_met() -> None:
    assert all(bar.holds for bar in report.bars(all_good()))


WORSE: dict[str, Callable[[Results], Results]] = {
    "best and mean reward rise": lambda r: replace(r, steps={TPO: [*r.steps[TPO][:2], r.steps[TPO][1]]}),
    "tpo beats best of 12": lambda r: replace(r, over=r.over | {"best of 12": Estimate(1.99, 0.0)}),
    "tpo beats best of N": lambda r: replace(
        r, over=r.over | {"best of 24 (as many tokens as tpo)": Estimate(1.49, 0.0)}
    ),
    "the suggestions of another query": lambda r: replace(r, over=r.over | {FOREIGN: Estimate(0.99, 0.0)}),
    "no suggestion loses more": lambda r: replace(r, over=r.over | {SILENT: Estimate(1.0, 0.0)}),
    "claims of critiques": lambda r: with_truth(r, claims_true=Estimate(0.949, 0.0)),
    "critiques with no false claim": lambda r: with_truth(r, critiques_true=Estimate(0.799, 0.0)),
    "suggestions that the critique supports": lambda r: with_truth(r, supported=Estimate(0.899, 0.0)),
    "points of the critique": lambda r: with_truth(r, carried=Estimate(0.899, 0.0)),
    "wrong facts": lambda r: with_final(r, wrong_facts=Estimate(0.03, 0.0)),
    "invented words": lambda r: with_final(r, invented_words=Estimate(0.006, 0.0)),
    "each kind of single fault": lambda r: replace(
        r, faults=r.faults | {"rude line": Sensitivity(Estimate(0.895, 0.0), GOOD)}
    ),
    "one job": lambda r: replace(r, seconds_a_job=3.0),
}


def with_truth(results: Results, **figures: Any) -> Results:
    """Return the results with other figures on the truth of critiques."""
    return replace(results, truths={TPO: replace(results.truths[TPO], **figures)})


def with_final(results: Results, **figures: Any) -> Results:
    """Return the results with other figures on the final answers."""
    return replace(results, outcomes={TPO: replace(results.outcomes[TPO], **figures)})


def test_bars_each_have_a_failing_case() -> None:
    assert len(report.bars(all_good())) == len(WORSE)


@pytest.mark.parametrize("name", WORSE)
def test_bar_fails_when_just_missed(name: str) -> None:
    (failed,) = [bar for bar in report.bars(WORSE[name](all_good())) if not bar.holds]
    assert failed.name.startswith(name)


def rows(document: Path) -> list[list[str]]:
    """Return the table rows of a document that contain a figure with its error, without bold markup."""
    lines = document.read_text(encoding="utf-8").replace("**", "").splitlines()
    return [re.split(r" *\| *", line.strip("| ")) for line in lines if line.startswith("|") and " ± " in line]


@pytest.mark.parametrize(
    "name", ["docs/measurements.md", "demo/models/policy/README.md", "demo/models/reward/README.md"]
)
def test_documented_figures_match_results(name: str) -> None:
    """Check that each row repeats the first columns of a measured row, with or without the errors."""
    measured = rows(FOLDER / "RESULTS.md")
    shown = rows(FOLDER.parent / name)
    assert shown
    for row in shown:
        assert any(
            all(cell in (whole, whole.split(" ± ")[0]) for cell, whole in zip(row, found, strict=False))
            for found in measured
            if len(found) >= len(row)
        ), row
