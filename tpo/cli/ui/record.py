"""The record of a job for people: first answer, critique, gradient, final answer, and the rewards of each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from tpo.cli.ui.progress import STYLES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tpo.core.state import State


WHY = {
    "max_output_tokens": "the budget of output tokens is used up",
    "max_total_tokens": "the budget of tokens is used up",
    "max_seconds": "the budget of seconds is used up",
    "deadline": "the deadline passed",
    "early_stop": "the best reward no longer rose",
    "decline": "the mean reward fell",
}
"""Explanations of the API's reasons for ending a job before its last iteration."""


@dataclass(frozen=True)
class Answer:
    """One candidate, as it is shown."""

    id: str
    text: str
    reward: float | None
    unusable: str | None


@dataclass(frozen=True)
class Step:
    """One iteration. Number 0 is the first sampling, which has no critique."""

    number: int
    answers: tuple[Answer, ...]
    chosen: str | None = None
    rejected: str | None = None
    critique: str | None = None
    gradient: str | None = None

    @property
    def rewards(self) -> list[float]:
        """Rewards of the scored answers."""
        return [a.reward for a in self.answers if a.reward is not None]


@dataclass(frozen=True)
class Record:
    """The steps of one job."""

    steps: tuple[Step, ...]

    @classmethod
    def of_state(cls, state: "State") -> Self:
        """Build the record of a run in this process."""
        iterations = {i.number: i for i in state.iterations}
        steps = []
        for number in range(1 + max((c.iteration for c in state.candidates), default=-1)):
            answers = tuple(Answer(c.id, c.text, c.reward, c.unusable) for c in state.of_iteration(number))
            if (iteration := iterations.get(number)) is None:
                steps.append(Step(number, answers))
                continue
            critique, gradient = iteration.critique, iteration.gradient
            steps.append(
                Step(
                    number,
                    answers,
                    iteration.chosen,
                    iteration.rejected,
                    critique.text if critique else None,
                    gradient.text if gradient else None,
                )
            )
        return cls(tuple(steps))

    @classmethod
    def of_api(cls, iterations: Sequence[Mapping[str, Any]], candidates: Sequence[Mapping[str, Any]]) -> Self:
        """Build the record from the API's iterations and candidates."""
        answers = [Answer(c["id"], c["text"], c["reward"], c["unusable"]) for c in candidates]
        numbers = {c["id"]: c["iteration"] for c in candidates}
        return cls(
            tuple(
                Step(
                    i["number"],
                    tuple(a for a in answers if numbers[a.id] == i["number"]),
                    i["chosen"] and i["chosen"]["id"],
                    i["rejected"] and i["rejected"]["id"],
                    i["critique"],
                    i["gradient"],
                )
                for i in iterations
            )
        )

    @property
    def first(self) -> Answer | None:
        """The first sample: the answer without optimization."""
        return next((a for step in self.steps for a in step.answers), None)

    @property
    def final(self) -> Answer | None:
        """The answer with the highest reward; the first one of equals."""
        pool = [a for step in self.steps for a in step.answers if a.reward is not None]
        return max(pool, key=lambda a: a.reward or 0.0, default=None)

    @property
    def decisive(self) -> Step | None:
        """The iteration that produced the final answer."""
        return next((step for step in self.steps if self.final in step.answers), None)


def print_outcome(console: "Console", record: Record) -> None:
    """Print the first and the final answer, and the critique, gradient and rewards between them."""
    first, final, decisive = record.first, record.final, record.decisive
    if first is not None:
        _print_text(console, f"First answer ({first.id}, {_verdict(first)})", first.text)
    if decisive is not None and decisive.number > 0:
        compared = f"{decisive.chosen} against {decisive.rejected}" if decisive.rejected else f"{decisive.chosen}"
        _print_text(console, f"Critique (iteration {decisive.number}, {compared})", decisive.critique)
        _print_text(console, "Gradient: what to change", decisive.gradient)
    if final is not None:
        _print_text(console, f"Final answer ({final.id}, {_verdict(final)})", final.text, style="green")
    console.print(rewards_table(record))
    if final is not None and first is not None:
        console.print(_conclusion(first, final, len(record.steps) - 1), markup=False)


def print_record(console: "Console", job: Mapping[str, Any], record: Record) -> None:
    """Print a job with all its iterations and candidates."""
    status = job["status"]
    console.print(f"[bold]{job['id']}[/]  [{STYLES.get(status, 'cyan')}]{status}[/]  attempt {job['attempt']}")
    if job["error"]:
        console.print(f"{job['error']['code']}: {job['error']['message']}", style="red", markup=False)
    if reason := job["stop_reason"] or (job["incomplete_details"] or {}).get("reason"):
        console.print(f"ended before its last iteration: {WHY.get(reason, reason)}", markup=False)
    if job["declined_iteration"] is not None and not job["stop_reason"]:
        console.print(f"the mean reward fell in iteration {job['declined_iteration']}", style="yellow", markup=False)
    for step in record.steps:
        console.rule(f"iteration {step.number}", style="dim")
        if step.chosen:
            console.print(f"chosen {step.chosen}, rejected {step.rejected or 'none'}", style="dim")
        _print_text(console, "Critique", step.critique)
        _print_text(console, "Gradient", step.gradient)
        for answer in step.answers:
            mark = " *" if answer == record.final else ""
            _print_text(console, f"{answer.id}  {_verdict(answer)}{mark}", answer.text)
    if record.steps:
        console.print(rewards_table(record))
    if job["output"] is not None:
        _print_text(console, "Output", job["output"], style="green")


def rewards_table(record: Record) -> "Table":
    """Return a table of each step's rewards: the mean of its samples, its best, and the best so far."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("iteration", "mean reward", "best reward", "best so far", "samples", "unusable"):
        rows.add_column(name, justify="right", no_wrap=True)
    best: float | None = None
    for step in record.steps:
        rewards = step.rewards
        best = max([*rewards, *([] if best is None else [best])], default=None)
        unusable = sum(1 for a in step.answers if a.unusable)
        rows.add_row(
            str(step.number),
            number(sum(rewards) / len(rewards) if rewards else None),
            number(max(rewards, default=None)),
            number(best),
            str(len(step.answers)),
            str(unusable or ""),
        )
    return rows


def number(value: float | None) -> str:
    """Format a reward, or a dash if there is none."""
    return "-" if value is None else f"{value:+.2f}"


def _verdict(answer: Answer) -> str:
    return f"unusable: {answer.unusable}" if answer.unusable else f"reward {number(answer.reward)}"


def _conclusion(first: Answer, final: Answer, iterations: int) -> str:
    if final.id == first.id:
        return "The first answer scored highest and is kept."
    gain = (
        "" if first.reward is None or final.reward is None else f", {number(final.reward - first.reward)} on the first"
    )
    if final.id.startswith("0-"):
        after = f"; no revision in {iterations} iterations scored higher" if iterations else ""
        return f"{final.id} scored highest of the first samples{gain}{after}."
    return f"{final.id} won: a revision with the highest reward of all{gain}."


def _print_text(console: "Console", title: str, text: str | None, style: str = "") -> None:
    if text:
        console.print(title, style="bold", markup=False)
        console.print(text, style=style or None, markup=False)
        console.print()
