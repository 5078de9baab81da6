"""Events of a job, derived from its states, so that they cannot disagree with the record."""

from typing import Any, NamedTuple

from tpo.core.loop import Position, Step
from tpo.core.state import State


class Event(NamedTuple):
    """An event that has no number yet."""

    type: str
    data: dict[str, Any]


def claim_events(position: Position, attempt: int) -> list[Event]:
    """Return the events of a claim."""
    return [Event("job.started", {"attempt": attempt}), *_phase_events(position)]


def step_events(step: Step) -> list[Event]:
    """Return the events of a recorded model call, and of the phase that follows, so that subscribers see its start."""
    after, position, iteration = step.after, step.position, step.request.iteration
    events: list[Event] = []
    if position.complete > iteration:
        events.append(Event("job.iteration.completed", summary(after, iteration)))
        if decline := after.declines.get(iteration):
            events.append(Event("job.iteration.declined", decline._asdict()))
        if position.phase:
            events.append(Event("job.iteration.started", {"iteration": position.iteration}))
    return events + _phase_events(position)


def summary(state: State, iteration: int) -> dict[str, Any]:
    """Summarize one iteration in numbers."""
    best = state.best
    return {
        "iteration": iteration,
        "mean_reward": state.mean_reward(iteration),
        "best_reward": best.reward if best else None,
        "best_candidate": best.id if best else None,
        "usable": sum(1 for c in state.of_iteration(iteration) if not c.unusable),
    }


def _phase_events(position: Position) -> list[Event]:
    """Return the event of the next call's phase; none at the end of the run."""
    if not position.phase:
        return []
    return [Event("job.phase", {"iteration": position.iteration, "phase": position.phase})]
