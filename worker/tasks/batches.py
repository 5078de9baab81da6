"""Batches, carried on a step at a time: counted, made into jobs as others end, and written into files.

Nothing is remembered between two steps: a message holds the batch's id, and where the batch stands is in its row.
"""

from collections.abc import Iterator
from functools import partial

from tpo.batches.steps import LineError, NewLine, Work, why_stopped
from tpo.batches.tables import Batch
from tpo.broker import JobNotifier
from tpo.core.errors import InvalidInputError
from tpo.jobs.insertion import JobOptions
from tpo.jobs.submission import Served, served, to_state
from tpo.openai import batch_lines
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.tenants import Limits
from worker.guard import guarded
from worker.logs import log

RING_SECONDS = 1.0
"""How often batches are looked for that have something to do: the pause in which a batch's next jobs are made."""

_LINES = 50
_UNREAD_LINES = 1000
_CANCELS = 100


class BatchAdvancer:
    """Takes the steps of batches."""

    def __init__(self, settings: Settings, store: Store, notifier: JobNotifier) -> None:
        self._settings = settings
        self._store = store
        self._notifier = notifier

    def notify_due(self) -> None:
        """Ring for the batches that nobody advanced lately. What fails now, the next round does."""
        with guarded("batches not notified"):
            for batch_id in self._store.batch_steps.due(RING_SECONDS / 2):
                self._notifier.notify_batch(batch_id)

    def advance(self, batch_id: str) -> None:
        """Take the next step of a batch, and ring again where another one can follow at once."""
        with guarded(f"{batch_id} not advanced"):
            if self._step(batch_id):
                self._notifier.notify_batch(batch_id)

    def _step(self, batch_id: str) -> bool:
        batch = self._store.batch_steps.unended(batch_id)
        if batch is None:
            return False
        match batch.status:
            case "validating":
                return self._count(batch)
            case "finalizing":
                return self._write(batch)
            case _:
                work = self._store.batch_steps.count_finished(batch_id)
                return work is not None and self._work(work)

    def _count(self, batch: Batch) -> bool:
        """Count the requests: a batch with none, or too many, is refused as a whole."""
        most = self._settings.max_batch_lines
        total = 0
        for _number, line, _end in self._lines(batch):
            total += not batch_lines.is_blank(line)
            if total > most:
                return self._refuse(batch, "too_many_requests", f"The file holds more than {most} requests.")
        if not total:
            return self._refuse(batch, "empty_file", "The file holds no request.")
        log.info("%s begins: %d requests", batch.id, total)
        return self._store.batch_steps.begin(batch, total)

    def _refuse(self, batch: Batch, code: str, message: str) -> bool:
        log.info("%s refused (%s)", batch.id, code)
        self._store.batch_steps.refuse(batch, code, message)
        return False

    def _work(self, work: Work) -> bool:
        """Make the next jobs where there is room for them; where the batch is to stop, leave the rest undone."""
        batch = work.batch
        stopped = why_stopped(batch, late=work.late)
        if stopped:
            for job_id in self._store.batch_steps.open_jobs(
                batch.id, _CANCELS, waiting_only=batch.status != "cancelling"
            ):
                self._store.for_tenant(batch.tenant).jobs.cancel(job_id)
        room = _UNREAD_LINES if stopped else self._room(work)
        taken: list[NewLine] = []
        offset, read = batch.offset, batch.line
        at_end = True
        for number, line, end in self._lines(batch):
            if len(taken) >= room:
                at_end = False
                break
            offset, read = end, number
            if not batch_lines.is_blank(line):
                taken.append(self._read(batch, number, line, work.seconds_left, stopped))
        if offset == batch.offset:
            return at_end and not work.in_flight and self._store.batch_steps.begin_results(batch)
        made = self._store.batch_steps.create_jobs(batch, taken, offset, read)
        if made is None:
            return False
        for job in made:
            self._notifier.notify_job(job.job_id, job.model)
        return True

    def _room(self, work: Work) -> int:
        """How many jobs can be made now: a batch leaves places to others, and keeps to its tenant's quota."""
        settings = self._settings
        limits = Limits(settings.max_jobs_in_flight)
        free = self._store.for_tenant(work.batch.tenant).jobs.free_slots(limits)
        return min(_LINES, settings.batch_jobs - work.in_flight, _LINES if free is None else free)

    def _read(
        self, batch: Batch, number: int, line: batch_lines.RawLine, left: float, stopped: LineError | None
    ) -> NewLine:
        found = batch_lines.read(line, batch.endpoint)
        if isinstance(found, batch_lines.Refused):
            return NewLine(number, found.custom_id, _fault(found.error))
        if stopped:
            return NewLine(number, found.custom_id, stopped)
        settings = self._settings
        try:
            body = found.body.submission()
            model, reward_model = served(body, settings, self._served)
            state = to_state(body, model, settings)
        except InvalidInputError as error:
            return NewLine(number, found.custom_id, _fault(found.body.as_sent(error)))
        options = JobOptions(
            model=model,
            reward_model=reward_model,
            max_attempts=settings.max_attempts,
            metadata=body.metadata,
            priority=body.priority,
            deadline_seconds=left if body.deadline_seconds is None else min(left, body.deadline_seconds),
        )
        return NewLine(number, found.custom_id, (state, options))

    def _served(self) -> list[Served]:
        return [
            Served(w.model, w.reward_model) for w in self._store.workers.live(self._settings.worker_timeout_seconds)
        ]

    def _write(self, batch: Batch) -> bool:
        """Write the next results into the batch's files."""
        more = self._store.batch_steps.write_results(
            batch, partial(batch_lines.result, batch.endpoint), batch_lines.is_answered
        )
        if more and self._store.batch_steps.unended(batch.id) is None:
            log.info("%s has ended", batch.id)
        return more

    def _lines(self, batch: Batch) -> Iterator[tuple[int, batch_lines.RawLine, int]]:
        """The lines that were not read yet: each with its number, and where it ends in the file."""
        end = batch.offset
        parts = self._store.files.content(batch.input_file_id, batch.offset)
        for number, line in enumerate(batch_lines.split(parts, self._settings.max_body_bytes), batch.line + 1):
            end += line.size
            yield number, line, end


def _fault(error: InvalidInputError) -> LineError:
    return LineError(error.code, str(error), error.param)
