"""Convert rows and states to the schemas of responses."""

from api import schemas
from tpo.core.loop import Position, locate
from tpo.core.state import Candidate, Message, Params, State
from tpo.core.state import Usage as StateUsage
from tpo.core.status import TERMINAL
from tpo.jobs import tables
from tpo.settings import Settings


def job(row: tables.Job, settings: Settings) -> schemas.Job:
    """Return the view of a job."""
    params = Params.model_validate(row.params)
    return schemas.Job(
        id=row.id,
        status=row.status,
        model=row.model,
        input=_input([Message.model_validate(m) for m in row.input]),
        parameters=schemas.JobParameters(
            **params.model_dump(),
            reward_model=row.reward_model,
            prompt_set=row.prompts["name"],
            prompt_set_version=row.prompts["version"],
        ),
        priority=row.priority,
        metadata=row.job_metadata,
        external_id=row.external_id,
        source_id=row.source_id,
        created_at=int(row.created_at),
        started_at=_seconds(row.started_at),
        completed_at=_seconds(row.completed_at),
        cancel_requested_at=_seconds(row.cancel_requested_at),
        pause_requested_at=_seconds(row.pause_requested_at),
        next_attempt_at=_seconds(row.next_attempt_at),
        deadline_at=_seconds(row.deadline_at),
        estimated_finish=_estimated_finish(row, params),
        expires_at=_expires_at(row, settings),
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        progress=schemas.Progress(iteration=row.iteration, max_iterations=params.iterations, phase=row.phase),
        best=_best(row),
        declined_iteration=row.declined_iteration,
        output=row.output,
        error=_error(row),
        incomplete_details=schemas.Incomplete(reason=row.incomplete_reason) if row.incomplete_reason else None,
        stop_reason=row.stop_reason,
        usage=_usage(
            StateUsage(
                input_tokens=row.input_tokens,
                output_tokens=row.output_tokens,
                reward_tokens=row.reward_tokens,
                model_seconds=row.model_seconds,
            )
        ),
    )


_PHASES = ("sampling", "scoring")
_LATER_PHASES = ("critique", "gradient", "update", "scoring")


def _estimated_finish(row: tables.Job, params: Params) -> int | None:
    """Estimate the end of a running job from the duration of its calls so far."""
    if row.status != "in_progress" or row.progressed_at is None or row.phase is None:
        return None
    total = len(_PHASES) + len(_LATER_PHASES) * params.iterations
    if row.iteration == 0:
        done = _PHASES.index(row.phase) if row.phase in _PHASES else 0
    else:
        done = len(_PHASES) + len(_LATER_PHASES) * (row.iteration - 1) + _LATER_PHASES.index(row.phase)
    if row.source_id is not None or not done:
        return None  # the calls of its source job are not in its usage
    return int(row.progressed_at + row.model_seconds / done * (total - done))


def _expires_at(row: tables.Job, settings: Settings) -> int | None:
    if settings.retention_days is None or row.completed_at is None:
        return None
    return int(row.completed_at + settings.retention_days * 24 * 3600)


def event(row: tables.EventRow) -> schemas.Event:
    """Return the view of an event."""
    return schemas.Event(
        type=row.type, sequence_number=row.number, job_id=row.job_id, created_at=int(row.created_at), **row.data
    )


def candidates(state: State) -> schemas.CandidateList:
    """Return the view of all candidates."""
    return schemas.CandidateList(data=[schemas.Candidate(id=c.id, **c.model_dump()) for c in state.candidates])


def iterations(row: tables.Job, state: State) -> schemas.IterationList:
    """Return the view of all iterations that have started. Number 0 is the initial sampling."""
    position = locate(state)
    last = max([len(state.iterations), *(c.iteration for c in state.candidates)])
    begun = range(last + 1) if state.calls or state.candidates else range(0)
    return schemas.IterationList(data=[_iteration(state, n, position, row.status in TERMINAL) for n in begun])


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


def _input(messages: list[Message]) -> str | list[Message]:
    single = len(messages) == 1 and messages[0].role == "user"
    return messages[0].content if single else messages


def _best(row: tables.Job) -> schemas.Best | None:
    if row.best_candidate is None or row.best_reward is None:
        return None
    iteration = int(row.best_candidate.partition("-")[0])
    return schemas.Best(iteration=iteration, candidate_id=row.best_candidate, reward=row.best_reward)


def _error(row: tables.Job) -> schemas.JobFailure | None:
    if row.error_code is None:
        return None
    return schemas.JobFailure(code=row.error_code, message=row.error_message or "")


def _usage(usage: StateUsage) -> schemas.Usage:
    return schemas.Usage(**usage.model_dump(), total_tokens=usage.total_tokens)


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
