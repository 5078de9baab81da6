"""A job's record: its `State` as rows, and the rows as a `State`."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from tpo.core.loop import Position, Step
from tpo.core.ports import Score
from tpo.core.prompts import PromptSet
from tpo.core.state import Call, Candidate, Iteration, Message, Note, Params, RewardPart, State
from tpo.jobs.tables import CallRow, CandidateRow, IterationRow, Job


def read_state(session: Session, job: Job) -> State:
    """Read the recorded state of a job's optimization."""

    def rows(table: Any, *order: Any) -> Any:
        return session.scalars(select(table).where(table.job_id == job.id).order_by(*order))

    return State(
        input=tuple(Message.model_validate(m) for m in job.input),
        params=Params.model_validate(job.params),
        prompts=PromptSet.model_validate(job.prompts),
        candidates=tuple(
            Candidate(
                iteration=c.iteration,
                sample=c.sample,
                text=c.text,
                tokens=c.tokens,
                reward=c.reward,
                unusable=c.unusable,
                parts=tuple(RewardPart.model_validate(part) for part in c.parts or ()),
            )
            for c in rows(CandidateRow, CandidateRow.iteration, CandidateRow.sample)
        ),
        iterations=tuple(
            Iteration(
                number=i.number,
                chosen=i.chosen,
                rejected=i.rejected,
                critique=None if i.critique is None else Note(text=i.critique, attempt=i.critique_attempt),
                gradient=None if i.gradient is None else Note(text=i.gradient, attempt=i.gradient_attempt),
            )
            for i in rows(IterationRow, IterationRow.number)
        ),
        calls=tuple(
            Call(
                number=c.number,
                kind=c.kind,
                iteration=c.iteration,
                n=c.n,
                input_tokens=c.input_tokens,
                output_tokens=c.output_tokens,
                seconds=c.seconds,
            )
            for c in rows(CallRow, CallRow.number)
        ),
    )


def save_step(session: Session, job_id: str, step: Step) -> None:
    """Write what one model call added or changed: its call, and its candidates, their rewards, or its note."""
    before, after, request = step.before, step.after, step.request
    _insert(session, CallRow, job_id, [after.calls[-1].model_dump()])
    if isinstance(request, Score):
        scored = [new for old, new in zip(before.candidates, after.candidates, strict=True) if new is not old]
        _update(session, CandidateRow, job_id, [_reward_columns(candidate) for candidate in scored])
    elif len(after.candidates) > len(before.candidates):
        _insert(session, CandidateRow, job_id, map(_candidate_columns, after.candidates[len(before.candidates) :]))
    else:
        write = _insert if len(after.iterations) > len(before.iterations) else _update
        write(session, IterationRow, job_id, [_iteration_columns(after.iteration(request.iteration))])


def save_record(session: Session, job_id: str, state: State) -> None:
    """Write the record that a new job starts from, if that is another job's."""
    _insert(session, CallRow, job_id, [call.model_dump() for call in state.calls])
    _insert(session, CandidateRow, job_id, map(_candidate_columns, state.candidates))
    _insert(session, IterationRow, job_id, map(_iteration_columns, state.iterations))


def _insert(session: Session, table: Any, job_id: str, rows: Iterable[dict[str, Any]]) -> None:
    # Lists of rows, not values in the statement: SQLAlchemy compiles such a statement once.
    if rows := [{"job_id": job_id, **row} for row in rows]:
        session.execute(insert(table), rows)


def _update(session: Session, table: Any, job_id: str, rows: Iterable[dict[str, Any]]) -> None:
    if rows := [{"job_id": job_id, **row} for row in rows]:
        session.execute(update(table), rows)


def _candidate_columns(candidate: Candidate) -> dict[str, Any]:
    return candidate.model_dump() | _parts(candidate)


def _reward_columns(candidate: Candidate) -> dict[str, Any]:
    return candidate.model_dump(include={"iteration", "sample", "reward", "unusable"}) | _parts(candidate)


def _parts(candidate: Candidate) -> dict[str, Any]:
    return {"parts": [part.model_dump() for part in candidate.parts] or None}


def _iteration_columns(iteration: Iteration) -> dict[str, Any]:
    values = iteration.model_dump(exclude={"critique", "gradient"})
    for name, note in (("critique", iteration.critique), ("gradient", iteration.gradient)):
        values |= {name: note and note.text, f"{name}_attempt": note.attempt if note else 0}
    return values


def without_progress(state: State) -> State:
    """Return the same optimization before its first step."""
    return state.model_copy(update={"candidates": (), "iterations": (), "calls": ()})


def progress_columns(state: State, where: Position) -> dict[str, Any]:
    """Return the columns of a job's row that show its progress."""
    best, usage = state.best, state.usage
    return {
        "iteration": where.iteration,
        "phase": where.phase if state.candidates else None,
        "best_candidate": best.id if best else None,
        "best_reward": best.reward if best else None,
        "declined_iteration": max(state.declines, default=None),
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "reward_tokens": usage.reward_tokens,
        "model_seconds": usage.model_seconds,
    }
