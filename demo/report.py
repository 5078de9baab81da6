"""Report of the evaluation: a Markdown page of tables, and a picture."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from demo.experiment import FOREIGN, ITERATIONS, QUERIES, REVISION, SAMPLE_SIZE, SEEDS, SILENT, TPO
from demo.grammar import NO_CHANGE, QUALITIES
from demo.judge import Estimate
from demo.measures import FAULT_CASES, Outcome, Results, Step, Truth

STYLES = {
    TPO: ("#0072b2", "o", "-"),
    REVISION: ("#d55e00", "s", "--"),
    FOREIGN: ("#cc79a7", "^", "-"),
    SILENT: ("#777777", "D", ":"),
}
"""Colour, marker and line of each arm; the colours of Okabe and Ito, which colour-blind readers can distinguish."""

HELD_OUT, UNSEEN = "new pairs of known words", "new words and wordings"


@dataclass(frozen=True)
class Bar:
    """A requirement that the demo must meet, the measured value, and whether it holds."""

    name: str
    measured: str
    holds: bool


def bars(results: Results) -> list[Bar]:
    """Return the requirements that the demo must meet, with their results."""
    over = {name.split(" (")[-1]: gain for name, gain in results.over.items()}
    equal, twelve, foreign, silent = (over[n] for n in ("as many tokens as tpo)", "best of 12", FOREIGN, SILENT))
    steps = results.steps[TPO]
    rising = all(
        after.best.mean > before.best.mean and after.mean.mean > before.mean.mean
        for before, after in itertools.pairwise(steps)
    )
    curves = [" → ".join(f"{pick(step).mean:.2f}" for step in steps) for pick in (_best, _mean)]
    truth, final = results.truths[TPO], results.outcomes[TPO]
    least, weakest = min(results.faults.items(), key=lambda fault: fault[1].lowered.mean)
    return [
        Bar("best and mean reward rise at each step", f"best {curves[0]}; mean {curves[1]}", rising),
        Bar("tpo beats best of 12 by at least 2.0", str(twelve), twelve.mean >= 2.0),
        Bar("tpo beats best of N at equal generated tokens by at least 1.5", str(equal), equal.mean >= 1.5),
        Bar("the suggestions of another query lose at least 1.0", str(foreign), foreign.mean >= 1.0),
        Bar("no suggestion loses more than another query's", f"{silent} > {foreign}", silent.mean > foreign.mean),
        _share_bar("claims of critiques that are true", truth.claims_true, 0.95),
        _share_bar("critiques with no false claim", truth.critiques_true, 0.8),
        _share_bar("suggestions that the critique supports", truth.supported, 0.9),
        _share_bar("points of the critique carried over", truth.carried, 0.9),
        Bar("wrong facts a final reply: under 0.03", f"{final.wrong_facts:.3f}", final.wrong_facts.mean < 0.03),
        Bar(
            "invented words in final replies: none",
            f"{final.invented_words:.3f} a reply",
            not final.invented_words.mean,
        ),
        Bar(
            "each kind of single fault lowers the reward in at least 90 % of cases",
            f"least: {least}, {percent(weakest.lowered)}",
            weakest.lowered.mean >= 0.9,
        ),
        Bar("one job of N = 4, D = 2 under 3 s", f"{results.seconds_a_job:.1f} s", results.seconds_a_job < 3.0),
    ]


def _share_bar(name: str, value: Estimate, least: float) -> Bar:
    return Bar(f"{name}: at least {100 * least:.0f} %", percent(value), value.mean >= least)


INTRODUCTION = f"""Measured by `python -m demo.evaluate` through the product's own loop and engine: {QUERIES} held-out
messages x {len(SEEDS)} seeds, N = {SAMPLE_SIZE}, D = {ITERATIONS}, temperature 0.7. ± is one standard error over the
messages (the mean over seeds is one value). A message is held out if no message of training had its pair of name and
item; every word and wording was seen. A second set, whose words and wordings are all new, stands below. The checker
that counts qualities also made the reward model's labels: it is no independent judge.
[TRANSCRIPTS.md](TRANSCRIPTS.md) is a reading without it. An error of zero says that no message differed here, not that
none can."""

CONTROLS = f"""Two controls take the suggestions away from tpo and leave all else: "{FOREIGN}" hands each textual
gradient on to the next message; "{SILENT}" puts "{NO_CHANGE}" in its place, a text that training showed."""

ABOUT_TRUTH = """A claim is one thing that a critique says a reply lacks; whatever else it says counts as one false
claim. A point is a claim about the chosen reply, or that the rejected one is rude."""

ABOUT_UNSEEN = f"""{QUERIES} messages x {len(SEEDS)} seeds whose names, items, problems, requests and wordings training
never showed, besides the messages above. The models fail here because every word of their world is one token, while
other words fall into pieces and bytes, which the policy never learned to copy. A reply that puts a known word in the
place of a new one has a wrong fact; one that garbles it has an invented word. A job fails where
every first answer is empty; the other figures leave it out."""

ABOUT_FAULTS = f"""One fault brought into a faultless reply to a held-out message, {FAULT_CASES} cases of each kind. ±
is one standard error over these cases."""


def page(results: Results) -> str:
    """Format the whole report in Markdown."""
    cost = (
        f"Updates that gave no usable answer: {results.unusable} of {results.updates}. "
        f"One job (N = {SAMPLE_SIZE}, D = {ITERATIONS}) alone on this machine: {results.seconds_a_job:.1f} s."
    )
    sections = [
        "# What the demo models do",
        INTRODUCTION,
        "## What has to hold",
        table(
            ("bar", "measured", "holds"),
            [(bar.name, bar.measured, "yes" if bar.holds else "**no**") for bar in bars(results)],
        ),
        "## Final replies",
        CONTROLS,
        outcomes_table({"": results.outcomes}),
        "Reward of tpo less the reward of the others, in pairs:",
        table(("tpo against", "difference"), results.over.items()),
        "## Step by step",
        "Best is the best so far, which can only rise; mean is the mean of the samples of that step alone.",
        steps_table(results),
        "![best and mean reward by step](results.png)",
        "## Critiques and suggestions",
        ABOUT_TRUTH,
        truths_table({"": results.truths}),
        "## New words and wordings",
        ABOUT_UNSEEN,
        outcomes_table({HELD_OUT: {arm: results.outcomes[arm] for arm in results.unseen}, UNSEEN: results.unseen}),
        truths_table({HELD_OUT: results.truths, UNSEEN: results.unseen_truths}),
        "## What the reward model notices",
        ABOUT_FAULTS,
        table(
            ("fault", "lowers the reward", "mean drop"),
            [(kind, percent(s.lowered), s.drop) for kind, s in results.faults.items()],
        ),
        cost,
    ]
    return "\n\n".join(sections) + "\n"


def outcomes_table(sets: dict[str, dict[str, Outcome]]) -> str:
    """Format the final replies of each arm, for each set of messages. A single set needs no name."""
    head = (
        "way",
        "samples",
        "tokens written",
        "best reward",
        f"qualities of {len(QUALITIES)}",
        "wrong facts a reply",
        "invented words a reply",
        "replies with no fault",
        "failed jobs",
    )
    rows = [
        (
            *_named(name),
            arm,
            outcome.samples,
            f"{outcome.tokens:.0f}",
            outcome.reward,
            outcome.qualities,
            f"{outcome.wrong_facts:.3f}",
            f"{outcome.invented_words:.3f}",
            percent(outcome.faultless),
            outcome.failed,
        )
        for name, outcomes in sets.items()
        for arm, outcome in outcomes.items()
    ]
    return table((*_named("messages" if len(sets) > 1 else ""), *head), rows)


def steps_table(results: Results) -> str:
    """Format the rewards and qualities of each arm after each iteration."""
    rows = [
        (arm, number, step.best, step.mean, step.qualities)
        for arm, steps in results.steps.items()
        for number, step in enumerate(steps)
    ]
    return table(("way", "step", "best reward", "mean reward", "qualities of the best"), rows)


def truths_table(sets: dict[str, dict[str, Truth]]) -> str:
    """Format the shares of the critiques that are true and that reach the suggestions, for each set of messages."""
    head = (
        "way",
        "critiques",
        "claims true",
        "true of another query's replies (chance)",
        "critiques with no false claim",
        "suggestions that the critique supports",
        "points of the critique carried over",
    )
    rows = [
        (
            *_named(name),
            arm,
            truth.critiques,
            percent(truth.claims_true),
            percent(truth.claims_true_of_another),
            percent(truth.critiques_true),
            percent(truth.supported),
            percent(truth.carried),
        )
        for name, truths in sets.items()
        for arm, truth in truths.items()
    ]
    return table((*_named("messages" if len(sets) > 1 else ""), *head), rows)


def _named(name: str) -> tuple[str, ...]:
    return (name,) if name else ()


def percent(share: Estimate) -> str:
    """Format a share in percent."""
    return f"{Estimate(100 * share.mean, 100 * share.error):.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def draw(results: Results, path: Path) -> None:
    """Plot mean and best reward against the step, with the untreated policy as a line."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, title, pick in zip(panels, ("mean of the step's samples", "best so far"), (_mean, _best), strict=True):
        for arm, steps in results.steps.items():
            colour, marker, line = STYLES[arm]
            estimates = [pick(step) for step in steps]
            panel.errorbar(
                range(len(steps)),
                [e.mean for e in estimates],
                yerr=[e.error for e in estimates],
                label=arm,
                color=colour,
                marker=marker,
                markerfacecolor="white" if arm == REVISION else colour,
                linestyle=line,
                capsize=3,
            )
        untreated = results.steps[TPO][0].mean.mean
        panel.axhline(untreated, linestyle=(0, (1, 3)), color="black", linewidth=1, label="untreated policy (mean)")
        panel.set(title=title, xlabel="step", xticks=range(ITERATIONS + 1))
    panels[0].set_ylabel("reward")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)


def _mean(step: Step) -> Estimate:
    return step.mean


def _best(step: Step) -> Estimate:
    return step.best
