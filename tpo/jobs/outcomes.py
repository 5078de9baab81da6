"""Outcomes: how a job ends, and its last event."""

from dataclasses import dataclass

from tpo.core.loop import locate
from tpo.core.state import State, StopReason
from tpo.core.status import Status
from tpo.jobs.events import Event
from tpo.jobs.tables import IncompleteReason, Job


@dataclass(frozen=True)
class Outcome:
    """The end of a job."""

    status: Status
    output: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    incomplete_reason: IncompleteReason | None = None
    stop_reason: StopReason | None = None
    """Why a completed job made fewer iterations than requested."""


def outcome_of_run(state: State) -> Outcome:
    """Return the outcome of a run that has no next call: complete, stopped early, or cut short by a budget."""
    output = state.best.text if state.best else None
    match locate(state).stopped:
        case "early_stop" | "decline" as reason:
            return Outcome("completed", output=output, stop_reason=reason)
        case None:
            return Outcome("completed", output=output)
        case budget:
            return Outcome("incomplete", output=output, incomplete_reason=budget)


def outcome_of_deadline(state: State) -> Outcome:
    """Return the outcome of a job past its deadline: the best candidate so far, if there is one."""
    if state.best is None:
        return Outcome("expired")
    return Outcome("incomplete", output=state.best.text, incomplete_reason="deadline")


def final_event(ended: Job | Outcome) -> Event:
    """Return the last event of a job, with the reason of its end."""
    reason = ended.incomplete_reason or ended.stop_reason or ended.error_code
    return Event(f"job.{ended.status}", {"reason": reason} if reason else {})
