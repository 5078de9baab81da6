"""Advance batches: count the requests, turn them into jobs as others end, and write the results into files.

A step is a few small transactions. Each is written only if no other step, and no cancel, came in between: two workers
that advance the same batch create every job once, and a crash repeats nothing that was written. Nothing is remembered
between two steps: how far a batch is, its row says.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Engine, and_, func, insert, or_, select, update
from sqlalchemy.orm import Session

from tpo.batches.files import FileQueries, append, insert_file
from tpo.batches.lines import LineFormat, RawLine, RefusedLine, split_lines
from tpo.batches.tables import Batch, BatchLine, BatchStatus, File
from tpo.broker import JobNotifier
from tpo.core.errors import InvalidInputError
from tpo.core.state import State
from tpo.core.status import TERMINAL
from tpo.db import now, reading, writing
from tpo.jobs.insertion import JobOptions, NewJob, insert_jobs
from tpo.jobs.lifecycle import JobQueries
from tpo.jobs.submission import Served, resolve_models, to_state
from tpo.jobs.tables import Job
from tpo.jobs.view import JobView
from tpo.jobs.workers import WorkerQueries
from tpo.settings import Settings
from tpo.tenants.tenants import Limits
from tpo.webhooks.outbox import enqueue_webhooks

_log = logging.getLogger(__name__)

_WORKING: tuple[BatchStatus, ...] = ("validating", "in_progress", "cancelling", "finalizing")
_READ_LINES = 50
_READ_LINES_STOPPED = 1000
_STEP_LINES = 50_000
_STEP_BYTES = 2**20
"""A step reads no more lines and bytes than these, blank ones and overlong ones included, and one line beyond."""
_CANCELLED_JOBS = 100
_WRITTEN_LINES = 200


class LineError(NamedTuple):
    """The reason why a line has no answer."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class _NewLine:
    """A line that was read: the job that it asks for, or why there is none."""

    number: int
    custom_id: str | None
    wanted: tuple[State, JobOptions] | LineError


class _Progress(NamedTuple):
    """The progress of a running batch."""

    batch: Batch
    in_flight: int
    seconds_left: float
    stopped: LineError | None
    """Why its remaining requests are left undone; None while it runs."""


class _Reader(Iterator[RawLine]):
    """Reads the lines that follow, up to the limits of one step, and keeps track of the position in the file."""

    def __init__(self, files: FileQueries, batch: Batch, longest: int) -> None:
        self.offset = batch.offset
        """Bytes read, up to the end of a line or to somewhere within one that is too long."""
        self.line = batch.line
        """Lines of which the end was read."""
        self.at_end = False
        self._left = (_STEP_LINES, _STEP_BYTES)
        inside = False
        if self.offset:
            # A step ends within a line only if that line is too long.
            inside = next(files.content(batch.input_file_id, self.offset - 1), b"\n")[:1] != b"\n"
        content = files.content(batch.input_file_id, self.offset)
        self._lines = split_lines(content, longest, inside_line=inside)

    def __next__(self) -> RawLine:
        lines, size = self._left
        if lines <= 0 or size <= 0:
            raise StopIteration
        if (line := next(self._lines, None)) is None:
            self.at_end = True
            raise StopIteration
        self._left = (lines - 1, size - line.size)
        self.offset += line.size
        self.line += line.ended
        return line


class BatchAdvancer:
    """Decides on the next step of a batch and takes it, for every tenant."""

    def __init__(self, engine: Engine, settings: Settings, notifier: JobNotifier, lines: LineFormat) -> None:
        self._engine = engine
        self._settings = settings
        self._notifier = notifier
        self._lines = lines

    def due(self, silent_seconds: float) -> Sequence[str]:
        """Return running batches that were not advanced in the last `silent_seconds`."""
        silent = and_(Batch.status.in_(_WORKING), Batch.advanced_at <= now() - silent_seconds)
        with reading(self._engine) as session:
            return session.scalars(select(Batch.id).where(silent).order_by(Batch.advanced_at).limit(100)).all()

    def advance(self, batch_id: str) -> bool:
        """Take the next step of a batch. Returns whether another one can follow at once.

        Raises StoreUnavailableError, BrokerUnavailableError.
        """
        with reading(self._engine) as session:
            unended = select(Batch).where(Batch.id == batch_id, Batch.status.in_(_WORKING))
            batch = session.scalars(unended).one_or_none()
        if batch is None:
            return False
        match batch.status:
            case "validating":
                return self._validate(batch)
            case "finalizing":
                return self._write_results(batch)
            case _:
                return self._run(batch_id)

    def _validate(self, batch: Batch) -> bool:
        """Count some more requests. A batch with none, or too many, is refused as a whole."""
        most = self._settings.max_batch_lines
        reader = self._reader(batch)
        total = batch.total
        for line in reader:
            total += line.ended and not line.is_blank
            if total > most:
                return self._refuse(batch, "too_many_requests", f"The file holds more than {most} requests.")
        if not reader.at_end:
            with writing(self._engine) as session:
                return _take_step(session, batch, {"total": total, "offset": reader.offset, "line": reader.line})
        if not total:
            return self._refuse(batch, "empty_file", "The file holds no request.")
        with writing(self._engine) as session:
            values = {"total": total, "offset": 0, "line": 0, "status": "in_progress", "in_progress_at": now()}
            begun = _take_step(session, batch, values)
        _log.info("%s begins: %d requests", batch.id, total)
        return begun

    def _refuse(self, batch: Batch, code: str, message: str) -> bool:
        with writing(self._engine) as session:
            end_batch(session, batch, "failed", {"error_code": code, "error_message": message})
        _log.info("%s refused (%s)", batch.id, code)
        return False

    def _run(self, batch_id: str) -> bool:
        """Count what has ended, and create the next jobs; once the batch is to stop, leave the rest undone."""
        with writing(self._engine) as session:
            progress = _count_finished(session, batch_id)
        if progress is None:
            return False
        batch, stopped = progress.batch, progress.stopped
        if stopped:
            self._cancel_jobs(batch)
        capacity = _READ_LINES_STOPPED if stopped else self._capacity(progress)
        new: list[_NewLine] = []
        reader = self._reader(batch)
        while len(new) < capacity and (line := next(reader, None)):
            if line.ended and not line.is_blank:
                new.append(self._parse(progress, reader.line, line))
        with writing(self._engine) as session:
            if reader.offset == batch.offset:  # no line was left to read
                finished = reader.at_end and not progress.in_flight
                values = {"status": "finalizing", "finalizing_at": now()}
                return finished and _take_step(session, batch, values)
            created = _create_jobs(session, batch, new, reader.offset, reader.line)
        for job in created or ():
            self._notifier.notify_job(job.id, job.model)
        return created is not None

    def _cancel_jobs(self, batch: Batch) -> None:
        """Cancel the jobs that a stopped batch does not wait for."""
        unwanted = ("queued", "paused", "in_progress") if batch.status == "cancelling" else ("queued", "paused")
        query = (
            select(Job.id)
            .join(BatchLine, BatchLine.job_id == Job.id)
            .where(BatchLine.batch_id == batch.id, BatchLine.settled.is_(False), Job.status.in_(unwanted))
        )
        with reading(self._engine) as session:
            job_ids = session.scalars(query.limit(_CANCELLED_JOBS)).all()
        jobs = JobQueries(self._engine, batch.tenant)
        for job_id in job_ids:
            jobs.cancel(job_id)

    def _capacity(self, progress: _Progress) -> int:
        """Return how many jobs can be created now: batches leave capacity to others and respect the tenant's quota."""
        settings = self._settings
        free = JobQueries(self._engine, progress.batch.tenant).free_slots(Limits(settings.max_jobs_in_flight))
        return min(_READ_LINES, settings.batch_jobs - progress.in_flight, _READ_LINES if free is None else free)

    def _parse(self, progress: _Progress, number: int, line: RawLine) -> _NewLine:
        found = self._lines.parse(line, progress.batch.endpoint)
        if isinstance(found, RefusedLine):
            return _NewLine(number, found.custom_id, _line_error(found.error))
        if progress.stopped:
            return _NewLine(number, found.custom_id, progress.stopped)
        settings, left = self._settings, progress.seconds_left
        try:
            body = found.submission()
            model, reward_model = resolve_models(body, settings, self._served)
            state = to_state(body, model, settings)
        except InvalidInputError as error:
            return _NewLine(number, found.custom_id, _line_error(found.with_request_names(error)))
        options = JobOptions(
            model=model,
            reward_model=reward_model,
            max_attempts=settings.max_attempts,
            metadata=body.metadata,
            priority=body.priority,
            deadline_seconds=left if body.deadline_seconds is None else min(left, body.deadline_seconds),
        )
        return _NewLine(number, found.custom_id, (state, options))

    def _served(self) -> list[Served]:
        live = WorkerQueries(self._engine).live(self._settings.worker_timeout_seconds)
        return [Served(worker.model, worker.reward_model) for worker in live]

    def _reader(self, batch: Batch) -> "_Reader":
        files = FileQueries(self._engine, batch.tenant)
        return _Reader(files, batch, self._settings.max_body_bytes)

    def _write_results(self, batch: Batch) -> bool:
        """Write the results of the lines that follow, in their order; end the batch if none is left."""
        with writing(self._engine) as session:
            found = session.execute(
                select(BatchLine, Job)
                .outerjoin(Job, Job.id == BatchLine.job_id)
                .where(BatchLine.batch_id == batch.id, BatchLine.number > batch.written)
                .order_by(BatchLine.number)
                .limit(_WRITTEN_LINES)
            ).all()
            rows = [(line, None if job is None else JobView.of(job)) for line, job in found]
            if not rows:
                ended = _complete(session, batch)
            else:
                files = {"output_file_id": batch.output_file_id, "error_file_id": batch.error_file_id}
                for name, of_answers in (("output_file_id", True), ("error_file_id", False)):
                    data = b"".join(
                        self._lines.render(batch.endpoint, line, job)
                        for line, job in rows
                        if (job is not None and job.output is not None) is of_answers
                    )
                    if data:
                        filename = f"{batch.id}_{name.removesuffix('_file_id')}.jsonl"
                        files[name] = files[name] or insert_file(
                            session, batch.tenant, filename, "batch_output", batch.output_seconds
                        )
                        append(session, files[name] or "", data)
                if _take_step(session, batch, {**files, "written": rows[-1][0].number}):
                    return True
                session.rollback()
                return False
        if ended:
            _log.info("%s has ended", batch.id)
        return False


def end_batch(session: Session, batch: Batch, status: BatchStatus, values: dict[str, Any]) -> bool:
    """Take the last step of a batch and enqueue its webhooks. Returns False if another step came first."""
    if not _take_step(session, batch, {**values, "status": status, "ended_at": now()}):
        return False
    enqueue_webhooks(session, batch.tenant, {f"batch.{status}": batch.id})
    return True


def _take_step(session: Session, batch: Batch, values: dict[str, Any]) -> bool:
    """Write the step that follows the one that this batch was read after. Returns False if another one came first."""
    same = and_(Batch.id == batch.id, Batch.step == batch.step, Batch.status == batch.status)
    values = {**values, "step": Batch.step + 1, "advanced_at": now()}
    taken = update(Batch).where(same).values(values).returning(Batch.id).execution_options(synchronize_session=False)
    return session.execute(taken).one_or_none() is not None


def _count_finished(session: Session, batch_id: str) -> _Progress | None:
    """Count the jobs that have ended since the last step. None if another step came first, or the batch has ended."""
    found = select(Batch).where(Batch.id == batch_id, Batch.status.in_(("in_progress", "cancelling")))
    batch = session.scalars(found.with_for_update()).one_or_none()
    if batch is None:
        return None
    left = float(session.execute(select(Batch.expires_at - now()).where(Batch.id == batch_id)).scalar_one())
    stopped = _why_stopped(batch, late=left <= 0)
    open_lines = and_(BatchLine.batch_id == batch_id, BatchLine.settled.is_(False))
    ended = session.execute(
        select(
            BatchLine.number,
            Job.status,
            Job.output.is_not(None).label("is_answered"),
            Job.input_tokens,
            Job.output_tokens,
        )
        .outerjoin(Job, Job.id == BatchLine.job_id)
        .where(open_lines, or_(Job.id.is_(None), Job.status.in_(TERMINAL)))
    ).all()
    answered = sum(1 for row in ended if row.is_answered)
    _mark_settled(session, batch_id, [row.number for row in ended], None)
    if stopped is not None:
        unfinished = [row.number for row in ended if row.status in ("cancelled", "expired")]
        _mark_settled(session, batch_id, unfinished, stopped)
    values = {
        "completed": Batch.completed + answered,
        "failed": Batch.failed + len(ended) - answered,
        "input_tokens": Batch.input_tokens + sum(row.input_tokens or 0 for row in ended),
        "output_tokens": Batch.output_tokens + sum(row.output_tokens or 0 for row in ended),
    }
    if not _take_step(session, batch, values):
        return None
    session.refresh(batch)
    in_flight = session.execute(select(func.count()).where(open_lines)).scalar_one()
    return _Progress(batch, in_flight, left, stopped)


def _create_jobs(
    session: Session, batch: Batch, lines: Sequence[_NewLine], offset: int, line: int
) -> Sequence[JobView] | None:
    """Create the jobs of new lines, and record those that become none; of two lines with one custom_id, the second.

    Returns None if another step came first.
    """
    rows: list[dict[str, Any]] = []
    jobs: list[NewJob] = []
    known = _lines_by_custom_id(session, batch.id, [new.custom_id for new in lines if new.custom_id is not None])
    if not _take_step(session, batch, {"offset": offset, "line": line}):
        return None
    for new in lines:
        wanted = new.wanted
        if new.custom_id is not None and new.custom_id in known and not isinstance(wanted, LineError):
            message = f"custom_id: line {known[new.custom_id]} has the same."
            wanted = LineError("duplicate_custom_id", message, "custom_id")
        if new.custom_id is not None:
            known.setdefault(new.custom_id, new.number)
        row = {"batch_id": batch.id, "number": new.number, "custom_id": new.custom_id, "job_id": None}
        if isinstance(wanted, LineError):
            code, message, param = wanted
            rows.append({**row, "error_code": code, "error_message": message, "error_param": param, "settled": True})
            continue
        jobs.append((wanted[0], None, wanted[1]))
        rows.append({**row, "error_code": None, "error_message": None, "error_param": None, "settled": False})
    created = insert_jobs(session, batch.tenant, jobs) if jobs else []
    for row, job in zip((row for row in rows if not row["settled"]), created, strict=True):
        row["job_id"] = job.id
    if rows:
        session.execute(insert(BatchLine), rows)
    values: dict[str, Any] = {"failed": Batch.failed + sum(1 for row in rows if row["settled"])}
    if batch.in_progress_at is None:  # cancelled before its requests were counted
        values["total"] = Batch.total + len(rows)
    session.execute(update(Batch).where(Batch.id == batch.id).values(values))
    return created


def _complete(session: Session, batch: Batch) -> bool:
    """End a batch whose results are all written, and show its files."""
    late = select(BatchLine.number).where(BatchLine.batch_id == batch.id, BatchLine.error_code == "batch_expired")
    status: BatchStatus = "completed"
    if batch.cancelling_at is not None:
        status = "cancelled"
    elif session.scalars(late.limit(1)).one_or_none() is not None:
        status = "expired"
    files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
    session.execute(update(File).where(File.id.in_(files)).values(complete=True))
    return end_batch(session, batch, status, {})


def _why_stopped(batch: Batch, *, late: bool) -> LineError | None:
    """Return the error of requests that a batch leaves undone; None while it runs."""
    if batch.status == "cancelling":
        return LineError("batch_cancelled", "The batch was cancelled before this request was executed.")
    if late:
        message = "This request could not be executed before the completion window expired."
        return LineError("batch_expired", message)
    return None


def _mark_settled(session: Session, batch_id: str, numbers: Sequence[int], error: LineError | None) -> None:
    why = {"error_code": error.code, "error_message": error.message} if error else {}
    which = update(BatchLine).where(BatchLine.batch_id == batch_id, BatchLine.number.in_(numbers))
    session.execute(which.values(settled=True, **why).execution_options(synchronize_session=False))


def _lines_by_custom_id(session: Session, batch_id: str, custom_ids: Sequence[str]) -> dict[str, int]:
    """Find earlier lines that have one of these ids."""
    query = select(BatchLine.custom_id, func.min(BatchLine.number)).where(
        BatchLine.batch_id == batch_id, BatchLine.custom_id.in_(custom_ids)
    )
    rows = session.execute(query.group_by(BatchLine.custom_id))
    return {custom_id: number for custom_id, number in rows if custom_id is not None}


def _line_error(error: InvalidInputError) -> LineError:
    return LineError(error.code or "", str(error), error.param)
