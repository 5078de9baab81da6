"""Transcripts of the runs: one line of JSON per run for programs, a page of Markdown for readers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tpo.core.state import Candidate

from demo import grammar, judge
from demo.experiment import ITERATIONS, Run


@dataclass(frozen=True)
class Count:
    """The checker's counts for one run: in its critiques and in its final reply."""

    claims: int
    false_claims: int
    wrong_facts: int
    invented_words: int


def count(run: Run) -> Count:
    """Count the claims and the faults of one run."""
    flags = [flag for criticism in judge.criticisms(run) for flag in criticism.truth()]
    final = run.best(ITERATIONS).text
    wrong = grammar.check(final, run.facts).wrong
    return Count(len(flags), flags.count(False), len(wrong), len(grammar.invented_words(final)))


def log_line(messages: str, arm: str, run: Run) -> str:
    """Format one run as a line of JSON, without times."""
    record = {
        "messages": messages,
        "way": arm,
        "seed": run.seed,
        "query": run.facts.query,
        "candidates": [
            {"id": c.id, "text": c.text, "reward": c.reward, "unusable": c.unusable} for c in run.state.candidates
        ],
        "iterations": [
            {
                "chosen": iteration.chosen,
                "rejected": iteration.rejected,
                "critique": iteration.critique and iteration.critique.text,
                "suggestions": iteration.gradient and iteration.gradient.text,
            }
            for iteration in run.state.iterations
        ],
        "final": run.best(ITERATIONS).id if run.pool(ITERATIONS) else None,
    }
    return json.dumps(record, ensure_ascii=False)


def page(runs: Sequence[Run]) -> str:
    """Format the runs in Markdown, followed by the checker's counts."""
    counts = [count(run) for run in runs]
    rows = [
        f"| {i} | {c.claims} | {c.false_claims} | {c.wrong_facts} | {c.invented_words} |"
        for i, c in enumerate(counts, 1)
    ]
    table = [
        "| transcript | claims | false claims | wrong facts | invented words |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    transcripts = [transcript(number, run) for number, run in enumerate(runs, 1)]
    return "\n\n".join([*transcripts, "## What the checker counts", "\n".join(table)]) + "\n"


def transcript(number: int, run: Run) -> str:
    """Format one run in Markdown: the message, the first answers, each step, the final answer."""
    best = run.best(ITERATIONS)
    parts = [f"### {number}", f"> {run.facts.query}", "First answers:", _candidates(run.state.of_iteration(0))]
    for iteration in run.state.iterations:
        parts += [
            f"Step {iteration.number}: chosen {iteration.chosen}, rejected {iteration.rejected}.",
            "\n".join(
                (
                    f"- critique: {iteration.critique.text if iteration.critique else 'none'}",
                    f"- suggestions: {iteration.gradient.text if iteration.gradient else 'none'}",
                )
            ),
            _candidates(run.state.of_iteration(iteration.number)),
        ]
    return "\n\n".join([*parts, f"**Final answer** {best.id} ({best.reward:.2f}): {best.text}"])


def _candidates(candidates: Iterable[Candidate]) -> str:
    return "\n".join(
        f"- {c.id} ({c.unusable or 'no reward' if c.reward is None else format(c.reward, '.2f')}): {c.text}"
        for c in candidates
    )
