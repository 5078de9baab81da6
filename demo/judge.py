"""Read the demo models' critiques claim by claim, and verify each claim.

The checker behind it also made the labels that the reward model learned from, so it is not an independent judge.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from demo import grammar
from demo.experiment import Run
from demo.grammar import Facts

_CLAIM = re.compile(r"The (chosen|rejected) reply lacks ([^.]*)\.?")


@dataclass(frozen=True)
class Claim:
    """A claim of a critique: which reply lacks which quality.

    `kind` is None if the words match no quality. Text about no reply is a claim about "neither".
    """

    about: str
    kind: str | None

    def holds(self, chosen: str, rejected: str | None, facts: Facts) -> bool:
        """Return True if the claim is true of these two replies. A claim about a reply that was not shown is false."""
        text = chosen if self.about == "chosen" else rejected
        if text is None or self.kind is None:
            return False
        lacking = set(grammar.QUALITIES) - grammar.check(text, facts).met
        return not lacking if self.kind == NOTHING else self.kind in lacking


NOTHING = "nothing"


def read_critique(text: str, facts: Facts) -> list[Claim]:
    """Read the claims of a critique. A claim with another message's facts, or any other text, has the kind None."""
    names = {facts.fill(phrase): kind for kind, phrase in grammar.LACKS.items()} | {NOTHING: NOTHING}
    claims = [
        Claim(about, names.get(phrase.strip()))
        for about, phrases in _CLAIM.findall(text)
        for phrase in re.split(r", | and ", phrases)
    ]
    return [*claims, Claim("neither", None)] if _CLAIM.sub("", text).strip() else claims


@dataclass(frozen=True)
class Criticism:
    """A critique of a run as it was read, with the replies that it is about and the suggestions made from it."""

    claims: list[Claim]
    suggestions: list[str | None]
    chosen: str
    rejected: str | None
    facts: Facts

    def truth(self, of: "Criticism | None" = None) -> list[bool]:
        """Return for each claim if it is true of these replies, or of the replies of another critique."""
        shown = of or self
        return [claim.holds(shown.chosen, shown.rejected, shown.facts) for claim in self.claims]


def criticisms(run: Run) -> list[Criticism]:
    """Read the critiques of a run, in order. Skips iterations without a critique."""
    return [
        Criticism(
            claims=read_critique(iteration.critique.text, run.facts),
            suggestions=read_suggestions(iteration.gradient.text, run.facts),
            chosen=run.state.candidate(iteration.chosen).text,
            rejected=run.state.candidate(iteration.rejected).text if iteration.rejected else None,
            facts=run.facts,
        )
        for iteration in run.state.iterations
        if iteration.critique and iteration.gradient
    ]


def read_suggestions(text: str, facts: Facts) -> list[str | None]:
    """Return the quality that each suggestion asks for; None if it matches no quality. Skips "Change nothing"."""
    names = {facts.fill(phrase): kind for kind, phrase in grammar.SUGGEST.items()}
    sentences = [sentence.strip() for sentence in re.findall(r"[^.]+\.?", text) if sentence.strip()]
    return [names.get(sentence) for sentence in sentences if sentence != grammar.NO_CHANGE]


def asked_for(claims: Sequence[Claim]) -> list[str | None]:
    """Return what a critique asks for: each point about the chosen reply, and POLITE if the rejected one is rude."""
    points = [claim.kind for claim in claims if claim.about == "chosen" and claim.kind != NOTHING]
    if grammar.POLITE not in points and Claim("rejected", grammar.POLITE) in claims:
        points.append(grammar.POLITE)
    return points


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Format both numbers alike, by default with two decimals."""
        spec = spec or ".2f"
        return f"{self.mean:{spec}} ± {self.error:{spec}}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, such as one per query, with its standard error."""
    return Estimate(fmean(values), stdev(values) / len(values) ** 0.5)


def share(flags_by_query: Sequence[Sequence[bool]]) -> Estimate:
    """Return the share of set flags, with the standard error over the queries.

    The error is that of a ratio, because queries can have different numbers of flags. NaN if there are no flags.
    """
    total = sum(len(flags) for flags in flags_by_query)
    if not total:
        return Estimate(float("nan"), float("nan"))
    mean = sum(sum(flags) for flags in flags_by_query) / total
    residuals = [sum(flags) - mean * len(flags) for flags in flags_by_query]
    return Estimate(mean, stdev(residuals) * len(residuals) ** 0.5 / total)
