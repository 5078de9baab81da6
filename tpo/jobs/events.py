"""Events of a job, derived from its states, so that they cannot disagree with the record."""

from typing import Any, NamedTuple

from tpo.core.loop import Position, Step
from tpo.core.state import State


class Event(NamedTuple):
    """An event before it has a number."""

    type: str
    data: dict[str, Any]


def of_start(where: Position, attempt: int) -> list[Event]:
    """Return the events of a claim."""
    return [Event("job.started", {"attempt": attempt}), *_of_next(where)]


def of_step(step: Step) -> list[Event]:
    """Return the events of a recorded model call, with the phase that follows, so that a listener sees it begin."""
    after, where, was = step.after, step.position, step.request.iteration
    events: list[Event] = []
    if where.complete > was:
        events.append(Event("job.iteration.completed", summary(after, was)))
        if decline := after.declines.get(was):
            events.append(Event("job.iteration.declined", decline._asdict()))
        if where.phase:
            events.append(Event("job.iteration.started", {"iteration": where.iteration}))
    return events + _of_next(where)


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


def _of_next(where: Position) -> list[Event]:
    return [Event("job.phase", {"iteration": where.iteration, "phase": where.phase})] if where.phase else []
