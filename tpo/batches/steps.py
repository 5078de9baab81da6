"""Batches: the steps in which the maintenance worker carries them on.

A step is one small transaction that is written only where no other step, and no cancel, came in between: two workers
that advance the same batch make every job once, and a crash repeats nothing that was written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import and_, func, insert, or_, select, update
from sqlalchemy.orm import Session

from tpo.batches.files import append, insert_file
from tpo.batches.tables import Batch, BatchLine, BatchStatus, File
from tpo.core.state import State
from tpo.core.status import TERMINAL
from tpo.db import Queries, now, reading, writing
from tpo.jobs.insertion import JobOptions, NewJob, insert_jobs
from tpo.jobs.tables import Job
from tpo.webhooks.outbox import enqueue_webhooks

_WORKING: tuple[BatchStatus, ...] = ("validating", "in_progress", "cancelling", "finalizing")
_WRITTEN_LINES = 200


class LineError(NamedTuple):
    """Why a line is no job."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class NewLine:
    """A line that was read: the job that it asks for, or why there is none."""

    number: int
    custom_id: str | None
    wanted: tuple[State, JobOptions] | LineError


class Made(NamedTuple):
    """A job that a step has made: ring for it."""

    job_id: str
    model: str


class Work(NamedTuple):
    """A batch that is worked on, as it stands."""

    batch: Batch
    in_flight: int
    late: bool
    """Whether its time is over."""
    seconds_left: float


class BatchStepQueries(Queries):
    """The part of the store that carries batches on."""

    def due(self, silent_seconds: float) -> Sequence[str]:
        """Batches that nobody advanced for so long."""
        silent = and_(Batch.status.in_(_WORKING), Batch.advanced_at <= now() - silent_seconds)
        with reading(self._engine) as session:
            return session.scalars(select(Batch.id).where(silent).order_by(Batch.advanced_at).limit(100)).all()

    def unended(self, batch_id: str) -> Batch | None:
        """A batch of any tenant that has something left to do."""
        with reading(self._engine) as session:
            return session.scalars(select(Batch).where(Batch.id == batch_id, Batch.status.in_(_WORKING))).one_or_none()

    def begin(self, batch: Batch, total: int) -> bool:
        """The requests are counted: work can begin. Of every step: False where another one came before."""
        values = {"total": total, "status": "in_progress", "in_progress_at": now()}
        return self._step(batch, values)

    def refuse(self, batch: Batch, code: str, message: str) -> bool:
        """The input as a whole cannot be worked on."""
        values = {"error_code": code, "error_message": message}
        with writing(self._engine) as session:
            return _end(session, batch, "failed", values)

    def count_finished(self, batch_id: str) -> Work | None:
        """Count the jobs that have ended since the last step. None where another step is under way, or all is done."""
        with writing(self._engine) as session:
            found = select(Batch).where(Batch.id == batch_id, Batch.status.in_(("in_progress", "cancelling")))
            batch = session.scalars(found.with_for_update()).one_or_none()
            if batch is None:
                return None
            left = float(session.execute(select(Batch.expires_at - now()).where(Batch.id == batch_id)).scalar_one())
            open_lines = and_(BatchLine.batch_id == batch_id, BatchLine.settled.is_(False))
            ended = session.execute(
                select(BatchLine.number, Job.status, Job.output.is_not(None), Job.input_tokens, Job.output_tokens)
                .outerjoin(Job, Job.id == BatchLine.job_id)
                .where(open_lines, or_(Job.id.is_(None), Job.status.in_(TERMINAL)))
            ).all()
            done = sum(1 for row in ended if row[2])
            _mark_settled(session, batch_id, [row[0] for row in ended], None)
            stopped = why_stopped(batch, late=left <= 0)
            if stopped is not None:
                unfinished = [row[0] for row in ended if row[1] in ("cancelled", "expired")]
                _mark_settled(session, batch_id, unfinished, stopped)
            values = {
                "completed": Batch.completed + done,
                "failed": Batch.failed + len(ended) - done,
                "input_tokens": Batch.input_tokens + sum(row[3] or 0 for row in ended),
                "output_tokens": Batch.output_tokens + sum(row[4] or 0 for row in ended),
            }
            if not _take(session, batch, values):
                return None
            session.refresh(batch)
            in_flight = session.execute(select(func.count()).where(open_lines)).scalar_one()
            return Work(batch, in_flight, left <= 0, left)

    def create_jobs(self, batch: Batch, lines: Sequence[NewLine], offset: int, line: int) -> Sequence[Made] | None:
        """Make the jobs of the lines that follow, and record those that cannot be; the second of a name is refused."""
        with writing(self._engine) as session:
            rows: list[dict[str, Any]] = []
            jobs: list[NewJob] = []
            names = _known_names(session, batch.id, [new.custom_id for new in lines if new.custom_id is not None])
            if not _take(session, batch, {"offset": offset, "line": line}):
                return None
            for new in lines:
                wanted = new.wanted
                if new.custom_id is not None and new.custom_id in names and not isinstance(wanted, LineError):
                    said = f"custom_id: line {names[new.custom_id]} has the same."
                    wanted = LineError("duplicate_custom_id", said, "custom_id")
                if new.custom_id is not None:
                    names.setdefault(new.custom_id, new.number)
                row = {"batch_id": batch.id, "number": new.number, "custom_id": new.custom_id}
                if isinstance(wanted, LineError):
                    told = {"error_code": wanted.code, "error_message": wanted.message, "error_param": wanted.param}
                    rows.append({**row, **told, "job_id": None, "settled": True})
                    continue
                jobs.append((wanted[0], None, wanted[1]))
                nothing = {"error_code": None, "error_message": None, "error_param": None}
                rows.append({**row, **nothing, "job_id": None, "settled": False})
            made = insert_jobs(session, batch.tenant, jobs) if jobs else []
            for row, job in zip((row for row in rows if not row["settled"]), made, strict=True):
                row["job_id"] = job.id
            if rows:
                session.execute(insert(BatchLine), rows)
            values: dict[str, Any] = {"failed": Batch.failed + sum(1 for row in rows if row["settled"])}
            if batch.in_progress_at is None:  # cancelled before its requests were counted
                values["total"] = Batch.total + len(rows)
            session.execute(update(Batch).where(Batch.id == batch.id).values(values))
            return [Made(job.id, job.model) for job in made]

    def open_jobs(self, batch_id: str, limit: int, *, waiting_only: bool) -> Sequence[str]:
        """Jobs of a batch that have to be cancelled with it."""
        unwanted = ("queued", "paused") if waiting_only else ("queued", "paused", "in_progress")
        query = (
            select(Job.id)
            .join(BatchLine, BatchLine.job_id == Job.id)
            .where(BatchLine.batch_id == batch_id, BatchLine.settled.is_(False), Job.status.in_(unwanted))
        )
        with reading(self._engine) as session:
            return session.scalars(query.limit(limit)).all()

    def begin_results(self, batch: Batch) -> bool:
        """Every request has a result: its files can be written."""
        return self._step(batch, {"status": "finalizing", "finalizing_at": now()})

    def write_results(
        self,
        batch: Batch,
        render: Callable[[BatchLine, Job | None], bytes],
        is_answered: Callable[[Job | None], bool],
    ) -> bool:
        """Write the results of the lines that follow, in their order, or end the batch where none does."""
        with writing(self._engine) as session:
            rows = session.execute(
                select(BatchLine, Job)
                .outerjoin(Job, Job.id == BatchLine.job_id)
                .where(BatchLine.batch_id == batch.id, BatchLine.number > batch.written)
                .order_by(BatchLine.number)
                .limit(_WRITTEN_LINES)
            ).all()
            if not rows:
                return self._end(session, batch)
            files = {"output_file_id": batch.output_file_id, "error_file_id": batch.error_file_id}
            for name, answered in (("output_file_id", True), ("error_file_id", False)):
                data = b"".join(render(line, job) for line, job in rows if is_answered(job) is answered)
                if data:
                    filename = f"{batch.id}_{name.removesuffix('_file_id')}.jsonl"
                    files[name] = files[name] or insert_file(
                        session, batch.tenant, filename, "batch_output", batch.output_seconds
                    )
                    append(session, files[name] or "", data)
            if not _take(session, batch, {**files, "written": rows[-1][0].number}):
                session.rollback()
                return False
            return True

    def _end(self, session: Session, batch: Batch) -> bool:
        late = select(BatchLine.number).where(BatchLine.batch_id == batch.id, BatchLine.error_code == "batch_expired")
        status: BatchStatus = "completed"
        if batch.cancelling_at is not None:
            status = "cancelled"
        elif session.scalars(late.limit(1)).one_or_none() is not None:
            status = "expired"
        files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        session.execute(update(File).where(File.id.in_(files)).values(complete=True))
        return _end(session, batch, status, {})

    def _step(self, batch: Batch, values: dict[str, Any]) -> bool:
        with writing(self._engine) as session:
            return _take(session, batch, values)


def why_stopped(batch: Batch, *, late: bool) -> LineError | None:
    """What is said of requests that a batch leaves undone; None where it goes on."""
    if batch.status == "cancelling":
        return LineError("batch_cancelled", "The batch was cancelled before this request was executed.")
    if late:
        return LineError("batch_expired", "This request could not be executed before the completion window expired.")
    return None


def _mark_settled(session: Session, batch_id: str, numbers: Sequence[int], fault: LineError | None) -> None:
    why = {"error_code": fault.code, "error_message": fault.message} if fault else {}
    which = update(BatchLine).where(BatchLine.batch_id == batch_id, BatchLine.number.in_(numbers))
    session.execute(which.values(settled=True, **why).execution_options(synchronize_session=False))


def _take(session: Session, batch: Batch, values: dict[str, Any]) -> bool:
    """Take the step that follows the one that this batch was read after; False where another one did."""
    same = and_(Batch.id == batch.id, Batch.step == batch.step, Batch.status == batch.status)
    taken = {**values, "step": Batch.step + 1, "advanced_at": now()}
    told = update(Batch).where(same).values(taken).returning(Batch.id).execution_options(synchronize_session=False)
    return session.execute(told).one_or_none() is not None


def _end(session: Session, batch: Batch, status: BatchStatus, values: dict[str, Any]) -> bool:
    """Take the last step, and have it told."""
    if not _take(session, batch, {**values, "status": status, "ended_at": now()}):
        return False
    enqueue_webhooks(session, batch.tenant, {f"batch.{status}": batch.id})
    return True


def _known_names(session: Session, batch_id: str, names: Sequence[str]) -> dict[str, int]:
    """Lines that came before and have one of these names."""
    query = select(BatchLine.custom_id, func.min(BatchLine.number)).where(
        BatchLine.batch_id == batch_id, BatchLine.custom_id.in_(names)
    )
    return {name: number for name, number in session.execute(query.group_by(BatchLine.custom_id)) if name is not None}
