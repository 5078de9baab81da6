"""Convert rows and states to the schemas of responses."""

from collections.abc import Sequence
from typing import Any

from api import schemas
from api.schemas.paging import fitting
from tpo.core.loop import Position, locate
from tpo.core.state import Candidate, Message, State
from tpo.core.state import Usage as StateUsage
from tpo.core.status import TERMINAL
from tpo.jobs.requests import Texts
from tpo.jobs.tables import EventRow
from tpo.jobs.view import JobView
from tpo.settings import Settings


def job(view: JobView, settings: Settings) -> schemas.Job:
    """Return the view of a job."""
    return schemas.Job(**_fields(view, settings), input=_input(view.input), output=view.output)


def job_summary(view: JobView, settings: Settings, texts: Texts) -> schemas.JobSummary:
    """Return the view of a job as an item of a list, with the texts that the list was asked for."""
    return schemas.JobSummary(
        **_fields(view, settings),
        input_preview=view.input_preview,
        input=None if texts.input is None else _input(texts.input),
        output=texts.output,
    )


def _fields(view: JobView, settings: Settings) -> dict[str, Any]:
    return {
        "id": view.id,
        "status": view.status,
        "model": view.model,
        "parameters": schemas.JobParameters(
            **view.params.model_dump(),
            reward_model=view.reward_model,
            prompt_set=view.prompt_set,
            prompt_set_version=view.prompt_set_version,
        ),
        "priority": view.priority,
        "metadata": view.metadata,
        "external_id": view.external_id,
        "source_id": view.source_id,
        "created_at": int(view.created_at),
        "started_at": _seconds(view.started_at),
        "completed_at": _seconds(view.completed_at),
        "cancel_requested_at": _seconds(view.cancel_requested_at),
        "pause_requested_at": _seconds(view.pause_requested_at),
        "next_attempt_at": _seconds(view.next_attempt_at),
        "deadline_at": _seconds(view.deadline_at),
        "estimated_finish": _estimated_finish(view),
        "expires_at": _expires_at(view, settings),
        "attempt": view.attempt,
        "max_attempts": view.max_attempts,
        "progress": schemas.Progress(iteration=view.iteration, max_iterations=view.params.iterations, phase=view.phase),
        "best": _best(view),
        "declined_iteration": view.declined_iteration,
        "error": _error(view),
        "incomplete_details": schemas.Incomplete(reason=view.incomplete_reason) if view.incomplete_reason else None,
        "stop_reason": view.stop_reason,
        "usage": _usage(
            StateUsage(
                input_tokens=view.input_tokens,
                output_tokens=view.output_tokens,
                reward_tokens=view.reward_tokens,
                model_seconds=view.model_seconds,
            )
        ),
    }


_PHASES = ("sampling", "scoring")
_LATER_PHASES = ("critique", "gradient", "update", "scoring")


def _estimated_finish(view: JobView) -> int | None:
    """Estimate the end of a running job from the duration of its calls so far."""
    if view.status != "in_progress" or view.progressed_at is None or view.phase is None:
        return None
    total = len(_PHASES) + len(_LATER_PHASES) * view.params.iterations
    if view.iteration == 0:
        done = _PHASES.index(view.phase) if view.phase in _PHASES else 0
    else:
        done = len(_PHASES) + len(_LATER_PHASES) * (view.iteration - 1) + _LATER_PHASES.index(view.phase)
    if view.source_id is not None or not done:
        return None  # the calls of its source job are not in its usage
    return int(view.progressed_at + view.model_seconds / done * (total - done))


def _expires_at(view: JobView, settings: Settings) -> int | None:
    if settings.retention_days is None or view.completed_at is None:
        return None
    return int(view.completed_at + settings.retention_days * 24 * 3600)


def event(row: EventRow) -> schemas.Event:
    """Return the view of an event."""
    return schemas.Event(
        type=row.type, sequence_number=row.number, job_id=row.job_id, created_at=int(row.created_at), **row.data
    )


def candidates(state: State, after: str | None) -> schemas.CandidateList:
    """Return the candidates that follow one, as many as fit into a page."""
    seen = (-1, -1) if after is None else tuple(map(int, after.split("-")))
    left = [c for c in state.candidates if (c.iteration, c.sample) > seen]
    page = fitting(schemas.Candidate(id=c.id, **c.model_dump()) for c in left)
    return schemas.CandidateList(data=page, has_more=len(left) > len(page))


def iterations(view: JobView, state: State, after: int) -> schemas.IterationList:
    """Return the iterations that have begun and follow one, as many as fit. The first sampling is number 0."""
    position = locate(state)
    last = max([len(state.iterations), *(c.iteration for c in state.candidates)])
    left = range(after + 1, last + 1) if state.calls or state.candidates else range(0)
    page = fitting(_iteration(state, n, position, view.status in TERMINAL) for n in left)
    return schemas.IterationList(data=page, has_more=len(left) > len(page))


def _iteration(state: State, number: int, position: Position, ended: bool) -> schemas.Iteration:
    record = state.iterations[number - 1] if number else None
    complete = number < position.complete
    rewards = [c.reward for c in state.pool if c.iteration <= number and c.reward is not None]
    calls = tuple(c for c in state.calls if c.iteration == number)
    return schemas.Iteration(
        number=number,
        complete=complete,
        phase=None if complete or ended else position.phase,
        chosen=_shown(state, record.chosen) if record else None,
        rejected=_shown(state, record.rejected) if record and record.rejected else None,
        critique=record.critique.text if record and record.critique else None,
        gradient=record.gradient.text if record and record.gradient else None,
        candidates=[
            schemas.CandidateSummary(id=c.id, reward=c.reward, unusable=c.unusable) for c in state.of_iteration(number)
        ],
        mean_reward=state.mean_reward(number),
        best_reward=max(rewards, default=None),
        reason=_no_candidate_reason(state, number) if complete else None,
        declined=number in state.declines,
        usage=_usage(state.model_copy(update={"calls": calls}).usage),
        calls=[schemas.Call(**c.model_dump(exclude={"number", "iteration"})) for c in calls],
    )


def _no_candidate_reason(state: State, number: int) -> schemas.NoCandidate | None:
    record = state.iterations[number - 1] if number else None
    if record and not (record.critique and record.critique.text):
        return "blank_critique"
    if record and not (record.gradient and record.gradient.text):
        return "blank_gradient"
    return "no_usable_sample" if all(c.unusable for c in state.of_iteration(number)) else None


def _shown(state: State, candidate_id: str) -> schemas.CandidateText:
    candidate: Candidate = state.candidate(candidate_id)
    return schemas.CandidateText(id=candidate.id, text=candidate.text, reward=candidate.reward)


def _input(messages: Sequence[Message]) -> str | list[Message]:
    single = len(messages) == 1 and messages[0].role == "user"
    return messages[0].content if single else list(messages)


def _best(view: JobView) -> schemas.Best | None:
    if view.best_candidate is None or view.best_reward is None:
        return None
    iteration = int(view.best_candidate.partition("-")[0])
    return schemas.Best(iteration=iteration, candidate_id=view.best_candidate, reward=view.best_reward)


def _error(view: JobView) -> schemas.JobFailure | None:
    if view.error_code is None:
        return None
    return schemas.JobFailure(code=view.error_code, message=view.error_message or "")


def _usage(usage: StateUsage) -> schemas.Usage:
    return schemas.Usage(**usage.model_dump(), total_tokens=usage.total_tokens)


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
