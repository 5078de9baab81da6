"""A job's record: its `State` as rows, and the rows as a `State`."""

from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from tpo.core.loop import Standing
from tpo.core.prompts import PromptSet
from tpo.core.state import Call, Candidate, Iteration, Message, Note, Params, RewardPart, State
from tpo.jobs.tables import CallRow, CandidateRow, IterationRow, Job


def read_state(session: Session, job: Job) -> State:
    """All that is recorded of a job's optimization."""

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
                loss=None if i.loss is None else Note(text=i.loss, attempt=i.loss_attempt),
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


def write_difference(session: Session, job_id: str, before: State, after: State) -> None:
    """Insert what is new and update what changed; a step changes its own rows alone."""
    key = {"job_id": job_id}
    new_calls = after.calls[len(before.calls) :]
    new_candidates = after.candidates[len(before.candidates) :]
    pairs = zip(before.candidates, after.candidates, strict=False)
    scored = [
        new.model_dump(include={"iteration", "sample", "reward", "unusable"}) | _parts(new)
        for old, new in pairs
        if old != new
    ]
    written = [i for i in after.iterations if i not in before.iterations]
    new_iterations = [i for i in written if i.number > len(before.iterations)]
    changed = [i for i in written if i.number <= len(before.iterations)]
    # Lists of rows, not values in the statement: SQLAlchemy compiles such a statement once.
    for statement, rows in (
        (insert(CallRow), [call.model_dump() for call in new_calls]),
        (insert(CandidateRow), [candidate.model_dump() | _parts(candidate) for candidate in new_candidates]),
        (update(CandidateRow), scored),
        (insert(IterationRow), [_iteration_values(i) for i in new_iterations]),
        (update(IterationRow), [_iteration_values(i) for i in changed]),
    ):
        if rows:
            session.execute(statement, [{**key, **row} for row in rows])


def _parts(candidate: Candidate) -> dict[str, Any]:
    return {"parts": [part.model_dump() for part in candidate.parts] or None}


def _iteration_values(iteration: Iteration) -> dict[str, Any]:
    values = iteration.model_dump(exclude={"loss", "gradient"})
    for name, note in (("loss", iteration.loss), ("gradient", iteration.gradient)):
        values |= {name: note and note.text, f"{name}_attempt": note.attempt if note else 0}
    return values


def fresh(state: State) -> State:
    """The same optimization before its first step."""
    return state.model_copy(update={"candidates": (), "iterations": (), "calls": ()})


def progress_of(state: State, where: Standing) -> dict[str, Any]:
    """Where a state stands, as its job's row tells it."""
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
        "call_seconds": usage.gpu_seconds,
    }
